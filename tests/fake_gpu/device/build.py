"""Build the fake device's extension for the torch of this Python: needs g++ and a minute, once.

Imports no torch: the extension has to be loaded before it, and whoever loads it comes here first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Name of the extension module.
NAME = "_fake_device"


def torch_folder() -> Path:
    """Where torch is installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("the fake GPU should be built for a torch that is installed, but there is none")
    return Path(spec.origin).parent


def problem() -> str | None:
    """Why there can be no fake device here; None if there can."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, but there is no {compiler} (CXX names another one)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python's headers, but there is no Python.h"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "needs torch's CPU build, but this one has CUDA"
    return None


def extension() -> Path:
    """The built extension; built where it is not, or of other sources."""
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    version = importlib.metadata.version("torch")
    content = b"".join([version.encode(), sys.version.encode(), *(source.read_bytes() for source in sources)])
    folder = HERE.parent / "build" / hashlib.sha256(content).hexdigest()[:12]
    built = folder / f"{NAME}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not built.exists():
            _compile([source for source in sources if source.suffix == ".cpp"], folder, built)
    return built


@contextmanager
def _locked(path: Path):
    """Test processes that start together build once."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(sources: list[Path], folder: Path, built: Path) -> None:
    reason = problem()
    if reason is not None:
        raise SystemExit(f"the fake GPU cannot be built: it {reason}")
    compiler, torch = os.environ.get("CXX", "g++"), torch_folder()
    print(f"building the fake GPU in {folder} (a minute)", file=sys.stderr, flush=True)
    include = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    flags = ["-O1", "-std=c++20", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={NAME}", *(f"-I{path}" for path in include)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(made)])
        for source, made in zip(sources, objects, strict=True)
    ]
    # wait for all of them
    if any([process.wait() for process in running]):  # noqa: C419
        raise SystemExit("the fake GPU did not compile: see above")
    lib = torch / "lib"
    libraries = [f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", f"-Wl,-rpath,{lib}"]
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", f"{built}.new", *libraries], check=True)
    Path(f"{built}.new").rename(built)


if __name__ == "__main__":
    print(extension())

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "build"
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
    """The extension, built where it is not, or of other sources or for another torch."""
    sources = sorted(HERE.glob("*.cpp"))
    about = [importlib.metadata.version("torch").encode(), sys.version.encode(), (HERE / "runtime.h").read_bytes()]
    objects = [FOLDER / f"{source.stem}-{_digest(*about, source.read_bytes())}.o" for source in sources]
    # the module's name is that of its file
    built = FOLDER / _digest(*(made.name.encode() for made in objects)) / f"{NAME}.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with _locked(FOLDER / "lock"):
        if not built.exists():
            _build(sources, objects, built)
    return built


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Test processes that start together build once."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(sources: Sequence[Path], objects: Sequence[Path], built: Path) -> None:
    reason = problem()
    if reason is not None:
        raise SystemExit(f"the fake GPU cannot be built: it {reason}")
    print("building the fake GPU: a minute, once", file=sys.stderr, flush=True)
    compiler, torch = os.environ.get("CXX", "g++"), torch_folder()
    include = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    flags = ["-O1", "-std=c++20", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={NAME}", *(f"-I{path}" for path in include)]
    running = [
        subprocess.Popen([compiler, *flags, "-c", str(source), "-o", f"{made}.new"])
        for source, made in zip(sources, objects, strict=True)
        if not made.exists()
    ]
    # wait for all of them
    if any([process.wait() for process in running]):  # noqa: C419
        raise SystemExit("the fake GPU did not compile: see above")
    for made in objects:
        if not made.exists():
            Path(f"{made}.new").rename(made)
    lib = torch / "lib"
    libraries = [f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", f"-Wl,-rpath,{lib}"]
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", f"{built}.new", *libraries], check=True)
    Path(f"{built}.new").rename(built)


if __name__ == "__main__":
    print(extension())

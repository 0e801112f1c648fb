"""What a number must come with: the machine, the versions and the commit it was measured with."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.timing import CPU_THREADS
from optimx.measuring.packages import PEERS


def machine(gpu: bool, stub: bool = False) -> dict[str, str]:
    """What two runs must share to be compared, by name; "none" or "unknown" where there is nothing to tell."""
    packages = {name: installed(name) for name in sorted(PEERS)}
    return {
        "device": "stub driver, no GPU" if stub else device(gpu),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "none",
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": installed("triton"),
        "python": platform.python_version(),
        "peers": ", ".join(f"{name} {version}" for name, version in packages.items() if version != "none") or "none",
    }


def device(gpu: bool) -> str:
    return torch.cuda.get_device_name() if gpu else f"CPU, {CPU_THREADS} threads"


def circumstances(command: str) -> dict[str, str]:
    """What else a result depends on. To be asked before the first measurement."""
    return {
        "commit": commit(),
        # a load near the number of cores when nothing has run yet: other work disturbs the times
        "load": f"{os.getloadavg()[0]:.1f} before the first case, {os.cpu_count()} cores",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": command,
    }


def machine_folder(gpu: bool, stub: bool = False) -> str:
    """The machine as the name of a folder: "nvidia-h200", "cpu-amd-epyc-2-threads", "stub-driver-amd-epyc"."""
    if stub:
        return slug(f"stub driver {cpu_model()}")
    return slug(torch.cuda.get_device_name() if gpu else f"cpu {cpu_model()} {CPU_THREADS} threads")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The short hash, with "-dirty" where the code that ran is not what the commit holds."""
    hash_ = output("git", "rev-parse", "--short", "HEAD")
    # results of earlier runs do not change what runs
    dirty = hash_ != "unknown" and output("git", "status", "--porcelain", "--", ".", ":!bench/results") != ""
    return f"{hash_}-dirty" if dirty else hash_


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def output(*command: str) -> str:
    """The first line a command prints, run from the repository's root; "unknown" if it cannot be run."""
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]

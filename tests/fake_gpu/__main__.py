"""Run tests marked ``gpu`` on the fake GPU: ``python -m tests.fake_gpu [pytest's arguments]``, or ``make fake-gpu``."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.fake_gpu.device import build

#: Every optimizer, clipping, AMP, graphs, two devices, waits, the smoke test of a GPU: in a minute.
THIN = [
    "tests/fake_gpu/test_device.py",
    "tests/fake_gpu/test_smoke.py",
    "tests/test_devices.py",
    "tests/test_gpu.py::test_the_first_step_does_not_synchronise_either",
    "tests/test_gpu.py::test_amp_does_not_synchronise",
    "tests/test_gpu.py::test_clip_grad_norm_does_not_synchronise",
    "tests/test_graphs.py",
    "tests/test_watched_gpu.py",
    "tests/test_storage.py",
    "tests/test_offload.py",
]
#: Of these tests.
THIN_NAMES = (
    "test_device.py or test_smoke.py or (test_devices and (adamw or not test_same)) or clip_grad or first_step "
    "or (goes_on and (adamw or sgd-stoch or muon-8bit)) or clipping_and_amp or no_step_came_before "
    "or (test_offload and (adamw-float32 or matrices or once_a_transfer or do_not_wait or written or refused)) "
    "or test_watched_gpu or (amp_does_not and 1.0-optimx) or tables_of or errors_under or without_capturable_says"
)


def main(arguments: list[str]) -> int:
    reason = build.problem()
    if reason is not None:
        print(f"fake GPU: NOT RUN, it {reason}", file=sys.stderr)
        # where changes are judged, nothing is left out silently
        return int(os.environ.get("CI", "").lower() in ("1", "true"))
    build.extension()
    chosen = arguments or [*THIN, "-k", THIN_NAMES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.fake_gpu.plugin",
        "-m",
        "gpu",
        "-n",
        "2",
        "--timeout",
        "300",
    ]
    command += chosen
    # the tensors are small, and tests run side by side
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

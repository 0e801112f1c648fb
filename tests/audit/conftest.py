from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob: list[str] = []
if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import triton

    # interpreted kernels cannot be compiled
    if triton.knobs.runtime.interpret:
        collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> list[str]:
    if collect_ignore_glob:
        return []
    from tests.audit.compiler import LEFT_OUT

    return [f"audit: {name} is left out: {reason}" for name, reason in LEFT_OUT.items()]

"""Benchmarks against torch.optim: ``python -m bench [QUESTION ...] [--gpu] [--quick] [--out DIR] [-k EXPRESSION]``.

Each question is a file of this folder, ``test_<question>.py``, and a run of pytest-benchmark of its own, so that none
measures in the memory that another has left behind. Its results go to ``<question>.json`` in a folder for the machine;
``python -m bench.report`` makes a page of them. A target that is missed is reported and is no failure; torch or optimx
raising is, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.provenance import machine_folder

HERE = Path(__file__).parent
QUESTIONS = tuple(sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")))
RESULTS = Path("bench/results")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Optimizer steps against torch.optim.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--gpu", action="store_true", help="the GPU cases instead of the CPU cases")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not for numbers")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: one for the machine in {RESULTS})")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="folder of earlier results to print beside these")
    parser.add_argument("-k", dest="expression", default="", help="only cases and contestants that match, as in pytest")
    options = parser.parse_args(arguments)
    for question in options.questions:
        if question not in QUESTIONS:
            parser.error(f"question should be one of {', '.join(QUESTIONS)}, but is: {question}")
    return options


def command(options: argparse.Namespace, question: str) -> str:
    """What gives these numbers again; where they are written does not matter to them."""
    words = ["python -m bench", question, *["--gpu"] * options.gpu, *["--quick"] * options.quick]
    words += [f'-k "{options.expression}"'] if options.expression else []
    return " ".join(words)


def pytest_command(options: argparse.Namespace, question: str, folder: Path) -> list[str]:
    words = [sys.executable, "-m", "pytest", str(HERE / f"test_{question}.py"), "-q", "--no-header"]
    # but that optimx has gone over to torch's own steps makes the comparison pointless
    words += ["-W", "ignore", "-W", "error:optimx:RuntimeWarning"]
    words += [
        "--benchmark-only",
        f"--benchmark-json={folder / question}.json",
        f"--command={command(options, question)}",
    ]
    words += ["--gpu"] * options.gpu + ["--quick"] * options.quick
    words += ["-k", options.expression] if options.expression else []
    earlier = options.compare / f"{question}.json" if options.compare else None
    if earlier is None or not earlier.exists():
        # its table is wider than a terminal; ours is printed
        return [*words, "--benchmark-quiet"]
    return [*words, f"--benchmark-compare={earlier}", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder = options.out or RESULTS / machine_folder(options.gpu)
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for question in options.questions or QUESTIONS:
        code = subprocess.run(pytest_command(options, question, folder), check=False).returncode
        # 5: the question has no case for this device, or none that matches
        status = status or (code if code != 5 else 0)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Benchmarks against torch.optim: ``python -m bench [QUESTION ...] [--gpu] [--quick] [--out DIR] [-k EXPRESSION]``.

``python -m bench host --stub`` measures what the host pays for a step on a GPU where there is none; ``--profile`` says
for what.

Each question is a file of this folder, ``test_<question>.py``, and a run of pytest-benchmark of its own, so that none
measures in the memory that another has left behind. Its results go to ``<question>.json`` in a folder for the machine;
``python -m bench.report`` makes a page of them. A target that is missed is reported and is no failure; torch or optimx
raising is, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.provenance import machine_folder

HERE = Path(__file__).parent
QUESTIONS = tuple(sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")))
RESULTS = Path("bench/results")
#: Questions that an H100 answers in less than nine minutes together.
PARTS = {
    "1": ("host", "step"),
    "2": ("clip", "amp", "groups", "adafactor", "muon", "memory"),
    "3": ("scaling", "schedulers", "dtensor", "riders", "compiled", "cautious"),
}
#: Pytest's exit status where a question has no case for this device, or none that matches.
NOTHING_RUN = 5


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Optimizer steps against torch.optim.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--gpu", action="store_true", help="the GPU cases instead of the CPU cases")
    parser.add_argument("--part", default="", help=f"a part of the questions, of {', '.join(PARTS)}; or questions")
    parser.add_argument("--stub", action="store_true", help="the host's part of a GPU's step, without a GPU")
    parser.add_argument("--profile", action="store_true", help="with --stub: where the time goes, and no benchmark")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not for numbers")
    out = f"folder of the results (default: one for the machine in {RESULTS}; with --quick or -k nothing is saved)"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--compare", type=Path, metavar="DIR", help="folder of earlier results to print beside these")
    parser.add_argument("-k", dest="expression", default="", help="only cases and contestants that match, as in pytest")
    options = parser.parse_args(arguments)
    for word in options.part.split():
        options.questions += PARTS.get(word, (word,))
    for question in options.questions:
        if question not in QUESTIONS:
            parser.error(f"question should be one of {', '.join(QUESTIONS)}, but is: {question}")
    if options.stub and (options.gpu or (options.questions or ["host"]) != ["host"]):
        parser.error(f"--stub is for host alone, without --gpu, but is with: {' '.join(options.questions) or '--gpu'}")
    if options.profile and not options.stub:
        parser.error("--profile needs --stub")
    if options.stub:
        options.questions = ["host"]
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU that torch can use; torch.cuda.is_available() is False")
    if options.out is None and not (options.quick or options.expression):
        # what is saved here is whole, and for numbers
        options.out = RESULTS / machine_folder(options.gpu, options.stub)
    if options.compare is not None and not options.compare.is_dir():
        parser.error(f"--compare should be a folder of results, but is: {options.compare}")
    return options


def command(options: argparse.Namespace, question: str) -> str:
    """What gives these numbers again; where they are written does not matter to them."""
    flags = {"--gpu": options.gpu, "--stub": options.stub, "--quick": options.quick}
    words = ["python -m bench", question, *(flag for flag, on in flags.items() if on)]
    words += [f'-k "{options.expression}"'] if options.expression else []
    return " ".join(words)


def pytest_command(options: argparse.Namespace, question: str, saved: Path | None) -> list[str]:
    words = [sys.executable, "-m", "pytest", str(HERE / f"test_{question}.py"), "-q", "--no-header"]
    # but that optimx has gone over to torch's own steps makes the comparison pointless
    words += ["-W", "ignore", "-W", "error:optimx:RuntimeWarning"]
    words += ["--benchmark-only", f"--command={command(options, question)}"]
    words += [f"--benchmark-json={saved}"] if saved else []
    words += ["--gpu"] * options.gpu + ["--quick"] * options.quick
    words += ["-p", "tests.fake_gpu.stub_plugin", "--stub"] * options.stub
    words += ["-k", options.expression] if options.expression else []
    earlier = options.compare / f"{question}.json" if options.compare else None
    if earlier is None or not earlier.exists():
        # its table is wider than a terminal; ours is printed
        return [*words, "--benchmark-quiet"]
    return [*words, f"--benchmark-compare={earlier}", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.profile:
        return subprocess.run([sys.executable, "-m", "bench.profile_host"], check=False).returncode
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    codes = [run(options, question) for question in options.questions or QUESTIONS]
    failures = [code for code in codes if code not in (0, NOTHING_RUN)]
    if failures:
        return failures[0]
    if 0 not in codes:
        print("bench: no case matches", file=sys.stderr)
        return NOTHING_RUN
    return 0


def run(options: argparse.Namespace, question: str) -> int:
    """Put one question; returns the exit status."""
    if options.out is None:
        return subprocess.run(pytest_command(options, question, None), check=False).returncode
    # some versions of pytest-benchmark empty the file when they begin; it may be what is compared with
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, f"{question}.json")
        code = subprocess.run(pytest_command(options, question, saved), check=False).returncode
        if saved.exists() and saved.stat().st_size:
            shutil.copy(saved, options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Benchmarks against torch.optim: ``python -m bench.run [--gpu] [--out DIR] [--quick] [--filter SUBSTR]``.

Prints a table of the cases in ``bench.cases`` and writes it as step.json and step.md. A missed target is reported and
is no failure; a contestant that raises is reported and makes the exit status 1.
"""

import argparse
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.cases import CASES
from bench.provenance import machine_slug, provenance
from bench.results import Row, Verdict, judge
from bench.tables import markdown, text_case, text_header
from bench.timing import CPU_THREADS, QUICK, Budget, measure

DEFAULT_OUT = Path("bench/results")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Optimizer steps against torch.optim.")
    parser.add_argument("--gpu", action="store_true", help="the GPU cases instead of the CPU cases")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help="folder for step.json and step.md (default: bench/results, in a folder named after the machine)",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not for numbers")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only cases whose name contains this")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    """The command that prints these numbers; where they are written does not matter to them."""
    words = ["python -m bench.run"]
    words += ["--gpu"] * options.gpu + ["--quick"] * options.quick
    words += [f"--filter {options.filter}"] if options.filter else []
    return " ".join(words)


def write(folder: Path, origin: dict[str, str], rows: list[Row], verdicts: list[Verdict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "provenance": origin,
        "rows": [asdict(row) for row in rows],
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    (folder / "step.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "step.md").write_text(markdown(origin, rows, verdicts))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = "cuda" if options.gpu else "cpu"
    if options.gpu and not torch.cuda.is_available():
        print("bench.run: --gpu needs a GPU that torch can use; torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    cases = [case for case in CASES if case.device == device and options.filter in case.name]
    if not cases:
        print(f"bench.run: no {device} case has {options.filter!r} in its name", file=sys.stderr)
        return 2
    if not options.gpu:
        torch.set_num_threads(CPU_THREADS)

    origin = provenance(command(options), options.gpu)
    folder = options.out / machine_slug(options.gpu) if options.out == DEFAULT_OUT else options.out
    rows: list[Row] = []
    verdicts: list[Verdict] = []
    print("\n".join(f"{name}: {value}" for name, value in origin.items()), text_header(), sep="\n\n", flush=True)
    for case in cases:
        by_name = measure(case, QUICK if options.quick else Budget())
        # a case's tensors go before the next one's come
        gc.collect()
        if options.gpu:
            torch.cuda.empty_cache()
        judged = judge(case, by_name)
        print(text_case(by_name.values(), judged), flush=True)
        rows += by_name.values()
        verdicts += judged
        # after every case, so that a crash in one does not take the others along
        write(folder, origin, rows, verdicts)
    held = sum(verdict.holds == "yes" for verdict in verdicts)
    print(f"\n{held} of {len(verdicts)} targets hold; written to {folder}/step.json and step.md")
    return int(any(row.error is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""What ``optimx bench`` prints of the models in ``examples``: ``python -m bench.step_costs [--out DIR] [--rounds N]``.

Each runs in a process of its own, on as many threads as the other benchmarks. The output goes to ``step_costs.json``
in a folder for the machine, and from there into README and documentation (``make report``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.provenance import circumstances, machine, machine_folder
from bench.timing import CPU_THREADS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
#: Arguments of ``optimx bench``.
TARGETS = (("examples/gpt2.py:model", "--compile"), ("examples/lora.py:model", "--compile"))


def printed(arguments: tuple[str, ...]) -> str:
    """What the command prints.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(CPU_THREADS)}
    command = [sys.executable, "-m", "optimx", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def lines(check: dict[str, Any], notes: bool = True) -> list[str]:
    """Of a page: commands and what they print, or the tables of that without the notes below them."""
    outputs = [entry["output"].strip() for entry in check["entries"]]
    if not notes:
        outputs = ["\n\n".join(output.split("\n\n")[:2]) for output in outputs]
    blocks = (f"$ {entry['command']}\n{output}" for entry, output in zip(check["entries"], outputs, strict=True))
    return ["```text", *"\n\n".join(blocks).splitlines(), "```"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step_costs", description="optimx bench on the examples.")
    parser.add_argument("--out", type=Path, help="folder of the results (default: one for the machine)")
    parser.add_argument("--rounds", help="turns that each contestant has (default: those of optimx bench)")
    options = parser.parse_args(arguments)
    out = options.out or RESULTS / machine_folder(gpu=False)
    run = circumstances("python -m bench.step_costs")
    more = ("--rounds", options.rounds) if options.rounds else ()
    entries = []
    for target in TARGETS:
        words = (*target, *more)
        entries.append({"command": " ".join(("optimx bench", *words)), "output": printed(words)})
        print(entries[-1]["output"], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine_info": machine(gpu=False), "run": run, "entries": entries}
    (out / "step_costs.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

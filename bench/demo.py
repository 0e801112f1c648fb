"""Train a small GPT with torch.optim, change the import, train it again: same losses, less time in the optimizer.

    python -m bench.demo                # about two minutes on two CPU cores; uses a GPU where there is one

The text is the source code of Python's standard library, read as bytes, so nothing is downloaded. The runs differ in
two arguments of :func:`train` and in nothing else: the module that the optimizer comes from and the clipping function.
The exit code is 1 when the losses do not agree (see :class:`Agreement`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import optimx
from bench import chart_style as style
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig

DEFAULT, FUSED, OURS = "torch.optim.AdamW", "torch.optim.AdamW(fused=True)", "optimx.AdamW"
COLORS = {DEFAULT: style.STOCK_DEFAULT, FUSED: style.STOCK_FUSED, OURS: style.OURS}

# not more: at 3e-3, without warmup, this model amplifies rounding until torch's own two implementations end 1.4 %
# apart, and comparing losses says little about an optimizer
LEARNING_RATE = 1e-3
TAIL = 20


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    model: GPTConfig
    steps: int
    batch: int
    seed: int
    device: torch.device


class Stopwatch:
    """Context manager that notes the milliseconds its block took, waiting for the GPU on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds: list[float] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception: object) -> None:
        self.milliseconds.append(self._now() - self._start)

    def quantile(self, fraction: float) -> float:
        """Quantile over the steps after warm-up: the first ones pay for state, caches and compilation."""
        steady = sorted(self.milliseconds[min(20, len(self.milliseconds) // 2) :])
        return steady[round(fraction * (len(steady) - 1))]


@dataclass
class Run:
    """What a training run leaves behind: losses in nats a byte, times in milliseconds a step."""

    optimizer_time: Stopwatch
    step_time: Stopwatch
    losses: list[float] = field(default_factory=list)
    validation_loss: float = float("nan")

    @property
    def last_loss(self) -> float:
        """Training loss at the end: the mean of the last 20 steps, as single batches are noisy."""
        return statistics.fmean(self.losses[-TAIL:])


def train(
    optim: ModuleType,
    clip_grad_norm_: Callable[..., Tensor],
    corpus: Corpus,
    settings: Settings,
    run: Run,
    **options: Any,
) -> Iterator[None]:
    """Train a fresh GPT and fill ``run``, yielding after every step and once more after validation.

    Args:
        optim: ``torch.optim`` or ``optimx``. This and the next are all that differs between two runs.
        clip_grad_norm_: ``torch.nn.utils.clip_grad_norm_`` or ``optimx.clip_grad_norm_``.
        corpus: Where the batches come from.
        settings: Model, number of steps, batch size, seed and device.
        run: Receives losses and times.
        options: More keywords for AdamW, such as ``fused=True``.
    """
    device, length = settings.device, settings.model.context + 1
    torch.manual_seed(settings.seed)
    model = GPT(settings.model).to(device)
    optimizer = optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, **options)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)

    for tokens in corpus.batches(settings.steps, settings.batch, length, settings.seed):
        with run.step_time:
            loss = model.loss(tokens.to(device))
            loss.backward()
            with run.optimizer_time:
                clip_grad_norm_(model.parameters(), max_norm=1.0)
                optimizer.step()
                scheduler.step()
            optimizer.zero_grad()
        run.losses.append(loss.item())
        yield

    with torch.no_grad():
        batches = corpus.validation_batches(settings.batch, length)
        run.validation_loss = statistics.fmean(model.loss(tokens.to(device)).item() for tokens in batches)
    yield


def train_all(settings: Settings, console: Console) -> dict[str, Run]:
    """Train once with each optimizer, under a progress bar each."""
    corpus = Corpus()
    runs = {name: Run(Stopwatch(settings.device), Stopwatch(settings.device)) for name in (DEFAULT, FUSED, OURS)}
    stock_clip = torch.nn.utils.clip_grad_norm_
    loops = (
        train(torch.optim, stock_clip, corpus, settings, runs[DEFAULT]),
        train(torch.optim, stock_clip, corpus, settings, runs[FUSED], fused=True),
        train(optimx, optimx.clip_grad_norm_, corpus, settings, runs[OURS]),
    )
    columns = (
        TextColumn("{task.description:<29}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=settings.steps, loss=float("nan")) for name in runs}
        # the runs take turns, a step each: another program on the machine can slow steps down a hundredfold for
        # seconds, and then slows all of them
        for _ in zip(*loops, strict=True):
            for name, run in runs.items():
                progress.update(tasks[name], completed=len(run.losses), loss=run.losses[-1])
    return runs


def differences(run: Run, baseline: Run) -> list[float]:
    """Absolute difference of the two training losses, step by step, nats."""
    return [abs(a - b) for a, b in zip(run.losses, baseline.losses, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """How far a run's losses are from a baseline's, and whether that is rounding.

    Both do the same float32 maths on the same batches; only the order of the roundings differs, by about 1e-7 relative
    a step. Training amplifies that along the trajectory, so the early losses are compared tightly and the end as a
    mean. On a CPU torch's own fused and default AdamW are 1e-6 apart over the first 20 steps, up to 2e-4 in a later one
    and 2e-6 relative at the end (seeds 0 to 2). Against that, ``weight_decay`` 0.09 for 0.1 moves an early loss by 1e-3
    and no clipping the end by 8 %.

    Args:
        early: Largest absolute difference over the first 20 steps, nats.
        whole: Largest absolute difference over the whole run, nats; shown, not judged: a single batch may be far off.
        last: Relative difference of the last training losses.
        validation: Relative difference of the validation losses.
    """

    early: float
    whole: float
    last: float
    validation: float

    EARLY_STEPS = 20
    EARLY_LIMIT = 1e-4
    END_LIMIT = 0.01

    @classmethod
    def between(cls, run: Run, baseline: Run) -> Agreement:
        """Compare two runs of the same length."""
        # torch's max, since Python's may drop a NaN
        gaps = torch.tensor(differences(run, baseline), dtype=torch.float64)
        return cls(
            early=gaps[: cls.EARLY_STEPS].max().item(),
            whole=gaps.max().item(),
            last=abs(run.last_loss / baseline.last_loss - 1),
            validation=abs(run.validation_loss / baseline.validation_loss - 1),
        )

    def failures(self) -> list[str]:
        """What is past its limit, in words; empty when the runs agree."""
        # `not <=` rather than `>`, which a NaN would pass
        found = []
        if not self.early <= self.EARLY_LIMIT:
            found.append(f"a loss of the first {self.EARLY_STEPS} steps is off by {self.early:.1e}")
        if not self.last <= self.END_LIMIT:
            found.append(f"the last loss is off by {self.last:.2%}")
        if not self.validation <= self.END_LIMIT:
            found.append(f"the validation loss is off by {self.validation:.2%}")
        return found


def short(milliseconds: float) -> str:
    """Three digits or so, in at most four characters up to 9999 ms."""
    return f"{milliseconds:.{2 if milliseconds < 9.995 else 1 if milliseconds < 99.95 else 0}f}"


def results_table(runs: dict[str, Run], baseline: str) -> Table:
    """One row a run: losses, optimizer time of a step (median, 20th to 80th percentile), speed against the baseline."""
    table = Table("", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("first\nloss", "last\nloss", "valid\nloss", "optim.\nms", "p20-p80\nms", "speed"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    reference = runs[baseline].optimizer_time.quantile(0.5)
    for name, run in runs.items():
        low, median, high = (run.optimizer_time.quantile(fraction) for fraction in (0.2, 0.5, 0.8))
        losses = (f"{loss:.3f}" for loss in (run.losses[0], run.last_loss, run.validation_loss))
        times = (short(median), f"{short(low)}-{short(high)}", f"{reference / median:.2f}x")
        table.add_row(name, *losses, *times, style="bold" if name == OURS else None)
    return table


def agreement_table(agreements: dict[str, Agreement], baseline: str) -> Table:
    """One row a comparison with the baseline, one column a run, the limits last."""
    table = Table(f"loss differences to\n{baseline}", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in (*agreements, "limit"):
        table.add_column(name.replace("AdamW", "\nAdamW", 1), justify="right", no_wrap=True, vertical="bottom")
    every = agreements.values()
    table.add_row("first 20 steps, largest", *(f"{a.early:.1e}" for a in every), f"{Agreement.EARLY_LIMIT:.0e}")
    table.add_row("all steps, largest", *(f"{a.whole:.1e}" for a in every), "-")
    table.add_row("last loss, relative", *(f"{a.last:.1e}" for a in every), f"{Agreement.END_LIMIT:.0e}")
    table.add_row("validation loss, relative", *(f"{a.validation:.1e}" for a in every), f"{Agreement.END_LIMIT:.0e}")
    return table


def plot(runs: dict[str, Run], baseline: str, path: Path) -> None:
    """Write a PNG: both loss curves on top of each other, and below how far each run is from the baseline."""
    with style.figure(8, 6) as figure:
        losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        losses.plot(runs[baseline].losses, color=COLORS[baseline], linewidth=6, alpha=0.5, label=baseline)
        losses.plot(runs[OURS].losses, color=style.OURS, linewidth=1, label=OURS)
        losses.set_ylabel("training loss (nats a byte)")
        losses.set_title("One GPT, one seed, one changed import")
        losses.legend()

        # float32 losses of 2 to 4 differ by 2.4e-7 or not at all; a logarithm has no zero, so equal ones get a floor
        floor = 1e-7
        for name, run in runs.items():
            if name != baseline:
                curve = [max(gap, floor) for gap in differences(run, runs[baseline])]
                gaps.plot(curve, label=name, color=COLORS[name], linewidth=1 if name == OURS else 2.5)
        early = Agreement.EARLY_STEPS
        gaps.hlines(Agreement.EARLY_LIMIT, 0, early, color=style.INK, label=f"limit of the first {early} steps")
        gaps.set(yscale="log", xlabel="step", ylabel="|loss difference|\n(floor: equal)")
        gaps.set_ylim(floor / 2, max(1e-3, gaps.get_ylim()[1]) * 10)
        gaps.legend(ncols=3, loc="upper right", fontsize="small")
        style.save(figure, path)


def count(text: str) -> int:
    """Parse an argument that is a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be >= 1 but is: {value}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Train a small GPT with torch.optim and with optimx; compare losses and optimizer time.",
        epilog="Exit code 1 when the losses disagree: by more than 1e-4 in the first 20 steps or 1 % at the end. Both "
        "do the same float32 maths in another order of roundings, so differences start near 1e-7 and grow slowly.",
    )
    parser.add_argument("--steps", type=count, default=300, help="training steps of each run (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for losses.png (default: demo_out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    baseline = parser.add_mutually_exclusive_group()
    for flag, name in (("--default", DEFAULT), ("--fused", FUSED)):
        help = f"compare with {name}" + (" (default)" if name == DEFAULT else "")
        baseline.add_argument(flag, dest="baseline", action="store_const", const=name, default=DEFAULT, help=help)
    for name, default in (("layers", 6), ("heads", 4), ("width", 128), ("context", 64), ("batch", 16)):
        parser.add_argument(f"--{name}", type=count, default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 when the losses agree and 1 when they do not."""
    args = parse(argv)
    model = GPTConfig(context=args.context, layers=args.layers, heads=args.heads, width=args.width)
    settings = Settings(model, args.steps, args.batch, args.seed, torch.device(args.device))

    console = Console(highlight=False)
    parameters = list(GPT(model).parameters())
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"GPT, {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors, reads Python's standard "
        f"library:\n{args.steps} steps of {args.batch} x {args.context} bytes, seed {args.seed}. "
        f"torch {torch.__version__}, {where}.\n"
    )
    runs = train_all(settings, console)
    baseline = runs[args.baseline]
    agreements = {name: Agreement.between(run, baseline) for name, run in runs.items() if name != args.baseline}

    console.print(results_table(runs, args.baseline))
    console.print(
        "optim. ms: clip_grad_norm_ + optimizer.step + scheduler.step, median of a step.\n"
        f"A whole training step takes {short(baseline.step_time.quantile(0.5))} ms with {args.baseline}."
    )
    console.print(agreement_table(agreements, args.baseline))
    path = args.out / "losses.png"
    plot(runs, args.baseline, path)
    console.print(f"Loss curves: {path}", soft_wrap=True)
    if failures := agreements[OURS].failures():
        console.print(f"[bold red]DISAGREE[/] {OURS} does not train like {args.baseline}:\n{'; '.join(failures)}.")
        return 1
    console.print(f"[bold green]AGREE[/] {OURS} trains like {args.baseline}, up to rounding.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

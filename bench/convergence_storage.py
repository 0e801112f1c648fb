"""Does training end where float32 ends if less is kept? ``python -m bench.convergence_storage``.

A GPT reads Python's source, as in the text task of ``bench.convergence``, with AdamW and every way to keep parameters
and states: same weights to begin with, same batches, and forward and backward pass in float32 on what the parameters
hold, so that only what is kept differs (and gradients of bfloat16 parameters, which torch rounds to bfloat16). Whoever
changes how numbers are kept must not see more than whoever changes the seed: see :func:`judge`. Rounding to the nearest
is there to show what the others are for, and may fail.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.convergence_tasks import Recipe, Text
from bench.convergence_text import Check, Curve, device_of, length, rounded, train
from bench.gpt import GPT, GPTConfig
from optimx.presets import PRESETS

CHECK = Check("convergence_storage", "Final losses of AdamW by how parameters and states are kept.")
SEEDS = 3
#: Measurements of a run, after the one before training.
POINTS = 6
#: Of the preset, but for betas: torch's default, with which an average of squares needs more than bfloat16.
ADAMW: dict[str, Any] = {**PRESETS["gpt-pretrain"].config["optimizer"], "betas": [0.9, 0.999]}

FLOAT32 = "float32"
#: What is rounded to the nearest.
PLAIN = ("nearest", "bfloat16")


class InFloat32(nn.Module):
    """A model that computes in float32 from parameters of any dtype."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        params = {name: p.float() for name, p in self.model.named_parameters()}
        return functional_call(self.model, params, (inputs,))


class KeptText(Text):
    """The text task for a GPT whose matrices are large enough for 8-bit states, and whose parameters have a dtype."""

    recipe = Recipe(steps=600, max_grad_norm=ADAMW["max_grad_norm"], warmup=60)

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device)
        self.dtype = dtype

    def model(self) -> nn.Module:
        # all begin with numbers that bfloat16 has
        return InFloat32(GPT(GPTConfig(context=self.context, layers=2)).bfloat16().to(self.dtype))


@dataclass(frozen=True)
class Scheme:
    """How numbers are kept.

    Args:
        params: ``"float32"``, or ``param_rounding`` of bfloat16 parameters.
        states: ``state_dtype``.
    """

    params: str
    states: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.float32 if self.params == FLOAT32 else torch.bfloat16

    @property
    def plain(self) -> bool:
        """Whether something is rounded to the nearest."""
        return self.params in PLAIN or self.states in PLAIN

    def section(self) -> dict[str, Any]:
        """The config's section ``optimizer``."""
        rounding = {} if self.params == FLOAT32 else {"param_rounding": self.params}
        return {**ADAMW, **rounding, "state_dtype": self.states}


#: float32 first, which the others are held against.
SCHEMES = (
    Scheme(FLOAT32, FLOAT32),
    *(Scheme(params, FLOAT32) for params in ("nearest", "stochastic", "remainder8", "remainder16", "master")),
    *(Scheme(FLOAT32, states) for states in ("bfloat16", "stochastic", "8bit")),
    *(Scheme(params, "8bit") for params in ("stochastic", "remainder8")),
)


def judge(losses: Sequence[float], float32: Sequence[float]) -> str:
    """Where the mean over the seeds is: "within" the range of float32's seeds, "above" it or "below" it.

    What is not a number is above.
    """
    mean = fmean(losses)
    if mean < min(float32):
        return "below"
    return "within" if mean <= max(float32) else "above"


def contest(tasks: dict[torch.dtype, KeptText], recipe: Recipe, seeds: int) -> dict[str, Any]:
    """Train: what the results have beside machine and circumstances."""
    every = recipe.steps // POINTS
    curves: dict[Scheme, list[Curve]] = {scheme: [] for scheme in SCHEMES}
    for seed in range(seeds):
        for scheme, runs in curves.items():
            with warnings.catch_warnings():
                # an average of squares in bfloat16 is what is measured
                warnings.filterwarnings("ignore", "exp_avg_sq in bfloat16")
                runs.append(train(tasks[scheme.dtype], recipe, scheme.section(), seed, every))
            print(f"seed {seed}: {scheme.params:<12} {scheme.states:<11} {runs[-1].losses[-1]:.4f}", flush=True)
    entries = [entry_of(scheme, runs, curves[SCHEMES[0]]) for scheme, runs in curves.items()]
    params = sum(p.numel() for p in tasks[torch.float32].model().parameters())
    return {
        "task": KeptText.title,
        "params": params,
        "recipe": asdict(recipe),
        "steps": list(range(0, recipe.steps + 1, every)),
        "schemes": entries,
    }


def entry_of(scheme: Scheme, runs: Sequence[Curve], float32: Sequence[Curve]) -> dict[str, Any]:
    """An entry of the results, with one loss a seed, and the verdict on text that was seen and that was not."""
    seen, unseen = ([run.seen for run in runs], [run.losses[-1] for run in runs])
    return {
        "params": scheme.params,
        "states": scheme.states,
        "plain": scheme.plain,
        "arguments": scheme.section(),
        "losses": [rounded(run.losses) for run in runs],
        "seen": rounded(seen),
        "verdict": {
            "seen": judge(seen, [run.seen for run in float32]),
            "unseen": judge(unseen, [run.losses[-1] for run in float32]),
        },
    }


def main(arguments: list[str] | None = None) -> int:
    options = CHECK.parse(arguments)
    results = CHECK.head(options)
    tasks = {dtype: KeptText(device_of(options), dtype) for dtype in (torch.float32, torch.bfloat16)}
    results |= contest(tasks, *length(KeptText.recipe, SEEDS, options))
    CHECK.save(results, options)
    worse = [entry for entry in results["schemes"] if "above" in entry["verdict"].values()]
    for entry in worse:
        expected = ", as expected" if entry["plain"] else ""
        print(f"{entry['params']}, {entry['states']}: above the seeds of float32{expected}", file=sys.stderr)
    return int(any(not entry["plain"] for entry in worse))


if __name__ == "__main__":
    sys.exit(main())

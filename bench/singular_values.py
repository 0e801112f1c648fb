"""The picture of what Muon's iterations do to a matrix: singular values before and after each set of coefficients."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

import optimx
from bench.chart_style import INK, OURS, STOCK_DEFAULT, figure, save
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig

#: Names of coefficients, and how many iterations they have.
COEFFICIENTS = {"standard": 5, "quintic5": 5, "polar-express": 5, "deepseek-v4": 10}
#: Training steps that the momentum has seen.
STEPS = 30
CONTEXT = 64


def momentum() -> Tensor:
    """Muon's momentum of a matrix in the middle of a small GPT that reads Python's source, ``[128, 512]``, norm 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=CONTEXT))
    muon = {"name": "muon", "lr": 1e-3, "adjust_lr_fn": "match_rms_adamw", "adamw": {"lr": 1e-3}}
    optimizer, _ = optimx.build(model, {"optimizer": muon})
    for tokens in Corpus().batches(STEPS, 16, CONTEXT + 1, seed=0):
        model.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
    average = optimizer.state[model.blocks[1].mlp.project.weight]["momentum_buffer"]
    return average / average.norm()


def orthogonalized(matrix: Tensor, coefficients: str) -> Tensor:
    """What a step of Muon subtracts from a wide matrix for a gradient, times the learning rate."""
    param = torch.nn.Parameter(torch.zeros_like(matrix))
    param.grad = matrix.clone()
    optimx.Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0, coefficients=coefficients).step()
    return -param.detach()


def histogram(axes: Axes, matrix: Tensor, edges: Tensor, color: str) -> None:
    """Bars of the singular values, which are computed in float64."""
    values = torch.linalg.svdvals(matrix.double())
    axes.hist(values.tolist(), bins=edges.tolist(), color=color, zorder=2)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_xlabel("singular value")
    axes.tick_params(labelsize=8)


def draw(path: Path) -> None:
    """Write a PNG: the momentum on a logarithmic axis, and below it what each set of coefficients makes of it."""
    matrix = momentum()
    rows, columns = matrix.shape
    with figure(8, 4.8) as chart:
        upper, lower = chart.subfigures(2, 1, height_ratios=(1, 1.3))
        before = upper.subplots()
        histogram(before, matrix, torch.logspace(-3.5, 0, 64), STOCK_DEFAULT)
        before.set(xscale="log", xlim=(3e-4, 1.5), ylabel="count")
        before.set_title(f"before: a momentum of {rows} x {columns}, divided by its norm")
        # a bin has 1 in its middle
        edges = torch.linspace(-0.02, 1.38, 36)
        for axes, (name, iterations) in zip(lower.subplots(1, len(COEFFICIENTS)), COEFFICIENTS.items(), strict=True):
            histogram(axes, orthogonalized(matrix, name), edges, OURS)
            axes.set(xlim=(-0.02, 1.38), xticks=(0, 0.5, 1))
            axes.set_title(f'"{name}"\n{iterations} iterations', fontsize=9)
        lower.axes[0].set_ylabel("count")
        save(chart, path)

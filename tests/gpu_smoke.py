"""The first minutes on a GPU: ``python -m tests.gpu_smoke [--out DIR]``, `make gpu-smoke`. Needs no pytest plugins.

Every optimizer, in each dtype, plain, clipped, under GradScaler and captured in a CUDA graph, beside its plain loop in
float64. A tensor that goes to torch's own step is a failure, and so is a warning of optimx.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine import backends
from tests.cases import CASES, Case, loop
from tests.engine import usual

#: A scalar, less than a chunk, one more than a chunk, and a matrix whose rows begin anywhere.
SHAPES = [(), (3, 3), (8193,), (300, 77)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Of a few steps of size 0.01, in numbers near 1: in 16 bits each rounds to three digits or four.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3, torch.float64: 1e-6}
SCALE = 8.0

Steps = Callable[[torch.optim.Optimizer, list[list[Tensor]]], None]


def _take(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad.to(param)
    optimizer.step()


def plain(optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> None:
    for grads in steps:
        _take(optimizer, grads)


def amp(optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> None:
    """Scaled gradients; before the last step comes one with an infinite gradient, which is skipped."""
    scaler = optimx.GradScaler("cuda", init_scale=SCALE, growth_interval=10**6, backoff_factor=0.5)
    scaler.scale(torch.ones((), device="cuda"))
    broken = [torch.full_like(grad, torch.inf) for grad in steps[0]]
    scale = SCALE
    for grads in [*steps[:-1], broken, steps[-1]]:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = (grad * scale).to(param)
        scaler.step(optimizer)
        scaler.update()
        if grads is broken:
            scale *= 0.5
            if not bool(optimizer.step_was_skipped):
                raise AssertionError("a step with an infinite gradient should be skipped but was taken")


def captured(optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> None:
    """A step on a side stream, as torch asks for, then a graph that is replayed for the others."""
    params = optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.zeros_like(param)

    def fill(grads: list[Tensor]) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fill(steps[0])
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for grads in steps[1:]:
        fill(grads)
        graph.replay()


#: Name -> how steps are taken, and further arguments of the optimizer.
WAYS: dict[str, tuple[Steps, dict[str, Any]]] = {
    "plain": (plain, {}),
    "clip": (plain, {"max_grad_norm": 1.0}),
    "amp": (amp, {"max_grad_norm": 1.0}),
    "capture": (captured, {"capturable": True}),
}


def check(case: Case, dtype: torch.dtype, way: str) -> str | None:
    """What is wrong; None if nothing is."""
    take, more = WAYS[way]
    # with Lion's own, averages of 16-bit numbers cancel to 0 often, and the sign of what is left is anybody's
    kwargs = {**usual(case, lr=0.01), **({"betas": (0.8765, 0.9876)} if case.name == "lion" else {})}
    if dtype is torch.float16:
        # squares of small gradients vanish in float16; then eps alone must not be the divisor
        kwargs |= usual(case, lr=0.01, eps=1e-3)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    steps = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(3)]
    params = [Parameter(tensor.cuda()) for tensor in start]
    exact = [Parameter(tensor.double()) for tensor in start]
    kwargs = case.rounded(kwargs, dtype)
    optimizer, stock = case.cls(params, **kwargs, **more), loop(case, exact, **kwargs)
    take(optimizer, [[grad.cuda() for grad in grads] for grads in steps])
    for grads in steps:
        for param, grad in zip(exact, grads, strict=True):
            param.grad = grad.double()
        if "max_grad_norm" in more:
            torch.nn.utils.clip_grad_norm_(exact, more["max_grad_norm"])
        stock.step()
    rows = optimx.explain(optimizer).rows
    if any(row.backend != backends.TRITON for row in rows):
        return "torch's own step: " + "; ".join(row.reason for row in rows if row.reason)
    for param, expected in zip(params, exact, strict=True):
        tolerance = TOLERANCE[dtype]
        error = (param.detach().cpu().double() - expected.detach()).abs().max().item()
        if not error <= tolerance * (1 + expected.detach().abs().max().item()):
            return f"shape {tuple(param.shape)} is off by {error:.2g}"
    return None


def attempt(case: Case, dtype: torch.dtype, way: str) -> str | None:
    try:
        return check(case, dtype, way)
    # one that fails must not hide what the others do
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"[:300]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_smoke")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one optimizer (default: all of them)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a GPU is needed that torch can use; torch.cuda.is_available() is False")
    # a kernel that fails is a failure here, not torch's step
    backends.strict = True
    warnings.filterwarnings("error", message="optimx", category=RuntimeWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, str | None] = {}
    began = time.perf_counter()
    for case in CASES:
        if options.only not in (None, case.name):
            continue
        for dtype in DTYPES:
            for way in WAYS:
                name = f"{case.name}-{str(dtype).removeprefix('torch.')}-{way}"
                results[name] = wrong = attempt(case, dtype, way)
                if wrong:
                    print(f"FAILED {name}: {wrong}", flush=True)
        print(f"{time.perf_counter() - began:6.1f} s  {case.name}", flush=True)
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        (options.out / "smoke.json").write_text(json.dumps(report, indent=1))
    failed = sum(wrong is not None for wrong in results.values())
    print(f"{len(results)} steps beside float64, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""The optimizer of docs/own_optimizer.md compiles as the project's own do: 128-bit accesses, nothing spilled."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from optimx.triton_kernels import update

from .assembly import examine, problems
from .compiler import TARGETS, compile_for
from .sizes import Sizes, numbers
from .variants import Variant

PAGE = Path(__file__).parents[2] / "docs" / "own_optimizer.md"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", TARGETS)
def test_assembly(architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = dict(
        re.findall(r'^```python title="my_optimizers/(\w+)\.py"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.M)
    )
    (tmp_path / "adopt_kernels.py").write_text(blocks["adopt_kernels"])
    monkeypatch.syspath_prepend(str(tmp_path))
    kernels = importlib.import_module("adopt_kernels")

    def call(size: Sizes) -> None:
        update.update_(
            kernels, size.table(3), size.grads(), numbers(1, len(kernels.HYPER)), None, variant=(), dtypes=(dtype,) * 4
        )

    variant = Variant("adopt_kernels", str(dtype), call, reads=(dtype,) * 4, writes=(dtype,) * 3)
    launch, limits = variant.on(TARGETS[architecture])
    kernel = compile_for(TARGETS[architecture], launch)
    assert kernel.metadata.name == "_adopt_kernels_kernel"
    found = problems(examine(kernel, limits.walk), limits)
    assert not found, "; ".join(found)

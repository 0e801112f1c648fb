"""Parameters and gradients in memory of any order, with gaps, twice: the same numbers as stock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.cases import Case, assert_same, loop, train, twins
from tests.engine import each_case, usual


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The values of ``tensor`` in memory that runs through the dimensions in ``order``."""
    return tensor.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_full((1,), 9.0), tensor.flatten()])[1:].view(tensor.shape)


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, 9.0)], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: strided(tensor, (3, 2, 1, 0)),
    "permuted": lambda tensor: strided(tensor, (1, 3, 0, 2)),
    "misaligned": misaligned,
    "gaps": with_gaps,
    "padded_rows": lambda tensor: torch.cat([tensor, torch.full_like(tensor, 9.0)], -1)[..., : tensor.shape[-1]],
}


@pytest.mark.parametrize("of_param", LAYOUTS)
@each_case
def test_layouts(case: Case, of_param: str, device: torch.device) -> None:
    """Parameters of one layout, one for each layout of gradients."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 3, 2, 1, generator=generator).to(device) for _ in range(4)]
    of_grads = {**LAYOUTS, "expanded": lambda grad: grad[:1, :1, :1].expand(grad.shape)}
    params = [Parameter(LAYOUTS[of_param](values[0].clone())) for _ in of_grads]
    twins = [Parameter(values[0].clone()) for _ in of_grads]
    storages = [p.detach().as_strided((p.untyped_storage().nbytes() // 4,), (1,), 0) for p in params]
    foreign = [storage == 9.0 for storage in storages]
    ours, stock = case.cls(params, **usual(case)), loop(case, twins, **usual(case))
    for grad in values[1:]:
        for param, twin, of_grad in zip(params, twins, of_grads.values(), strict=True):
            param.grad = of_grad(grad)
            twin.grad = param.grad.contiguous()
        ours.step()
        stock.step()
    assert_same(ours, stock)
    # what lies between and before the elements belongs to others
    for storage, others in zip(storages, foreign, strict=True):
        assert torch.equal(storage[others], torch.full_like(storage[others], 9.0))
    if of_param not in ("gaps", "padded_rows"):
        for param in params:
            factored = ("row_var", "col_var")
            states = [s for name, s in ours.state[param].items() if s.dim() and name not in factored]
            assert all(state.stride() == param.stride() for state in states)


@each_case
def test_strides_of_single_elements_mean_nothing(case: Case, device: torch.device) -> None:
    param = Parameter(torch.arange(5.0, device=device).as_strided((1, 5, 1), (1, 1, 77)))
    ours, stock, _ = twins(case, [param], usual(case))
    for step in range(2):
        train([ours, stock], 1, first=step)
        param.grad = torch.ones(1, 5, 1, device=device)
        stock.param_groups[0]["params"][0].grad = torch.ones(1, 5, 1, device=device)
        ours.step()
        stock.step()
    assert_same(ours, stock)

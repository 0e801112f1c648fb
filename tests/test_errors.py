"""What the constructors refuse: the same as stock, in the same words; and what our own arguments must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from tests.cases import CASES, Case, make_params
from tests.engine import each_case, outcomes

SHAPES = [(5,), (3, 4)]


BAD: list[dict[str, Any]] = [
    {"lr": -1},
    {"lr": -1e-9},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": "0.1"},
    {"lr": None},
    {"eps": -1e-8},
    {"betas": (1.0, 0.999)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9,)},
    {"betas": (0, 0.9)},
    {"betas": (0.9, torch.tensor(0.9))},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    {"weight_decay": -0.1},
    {"momentum": -0.1},
    {"momentum": "0.9"},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"alpha": -0.1},
    {"rho": -0.1},
    {"rho": 1.1},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -0.1},
    {"momentum_decay": -0.1},
    {"etas": (0.0, 1.2)},
    {"etas": (0.5, 1.0)},
    {"etas": (0.5,)},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]


def _bad() -> list:
    return [
        pytest.param(case, kwargs, id=f"{case.name}-{kwargs}")
        for case in CASES
        for kwargs in BAD
        if case.is_torchs and all(map(case.has, kwargs))
        # transformers' relative step sizes
        if not (case.name == "adafactor" and kwargs == {"lr": None})
    ]


@pytest.mark.parametrize(("case", "kwargs"), _bad())
def test_bad_hyperparameters(case: Case, kwargs: dict[str, Any]) -> None:
    """What torch's class refuses, ours refuses in the same words; what it takes, ours takes."""
    ours, stock = outcomes(case, lambda make: make(make_params(SHAPES), **kwargs))
    if isinstance(stock, tuple):
        assert ours == stock
    else:
        assert not isinstance(ours, tuple)


def test_bad_hyperparameters_are_bad() -> None:
    """Each entry of the table is refused by one of torch's classes at least."""
    for kwargs in BAD:
        cases = [case for case in CASES if case.is_torchs and all(map(case.has, kwargs))]
        results = [outcomes(case, lambda make, kwargs=kwargs: make(make_params(SHAPES), **kwargs)) for case in cases]
        assert any(isinstance(stock, tuple) for _, stock in results), kwargs


@each_case
def test_unknown_argument(case: Case) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        case.cls(make_params(SHAPES), no_such_argument=1)


#: For optimizers of our own: what is refused, and the rule in the message.
BAD_OF_OURS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1}, "lr should be >= 0 but is: -1"),
    ({"lr": float("nan")}, "lr should be >= 0 but is: nan"),
    ({"lr": torch.tensor(-1.0)}, f"lr should be >= 0 but is: {torch.tensor(-1.0)}"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr should have one element but has: 2"),
    ({"eps": -1e-8}, "eps should be >= 0 but is: -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay should be >= 0 but is: -0.1"),
    ({"betas": (1.0, 0.9)}, "betas[0] should be in [0, 1) but is: 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] should be in [0, 1) but is: -0.1"),
    ({"betas": (0.9, float("nan"))}, "betas[1] should be in [0, 1) but is: nan"),
    ({"betas": (0.9,)}, "betas should be two numbers but is: (0.9,)"),
    ({"max_trust_ratio": 0.0}, "max_trust_ratio should be > 0 but is: 0.0"),
    ({"max_trust_ratio": float("nan")}, "max_trust_ratio should be > 0 but is: nan"),
    (
        {"normalize_grads": True, "max_grad_norm": 1.0},
        "max_grad_norm should be None with normalize_grads=True but is: 1.0",
    ),
]


@pytest.mark.parametrize(
    ("case", "kwargs", "message"),
    [
        pytest.param(case, kwargs, message, id=f"{case.name}-{kwargs}")
        for case in CASES
        for kwargs, message in BAD_OF_OURS
        if not case.is_torchs and all(map(case.has, kwargs))
    ],
)
def test_bad_hyperparameters_of_our_own(case: Case, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        case.cls(make_params(SHAPES), **kwargs)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(list, id="no_params"),
        pytest.param(lambda: torch.ones(3), id="a_tensor"),
        pytest.param(lambda: ["text"], id="not_tensors"),
        pytest.param(lambda: [Parameter(torch.ones(3)) * 2], id="not_a_leaf"),
        pytest.param(lambda: [{"lr": 0.1}], id="group_without_params"),
        pytest.param(lambda: [{"params": {Parameter(torch.ones(3))}}], id="a_set"),
        pytest.param(lambda: [("a", Parameter(torch.ones(3))), Parameter(torch.ones(3))], id="some_named"),
        pytest.param(lambda: [{"params": make_params([(1,)])}, make_params([(1,)])[0]], id="group_and_param"),
        pytest.param(lambda: [{"params": [p]} for p in make_params([(1,)]) * 2], id="param_in_two_groups"),
    ],
)
@each_case
def test_bad_params(case: Case, make: Callable[[], Any]) -> None:
    # one value for both, as messages may show it
    params = make()
    ours, stock = outcomes(case, lambda make: make(params))
    assert isinstance(stock, tuple)
    assert ours == stock


@pytest.mark.parametrize("value", [0.0, -1.0, 0, float("nan")])
@each_case
def test_bad_max_grad_norm(case: Case, value: float) -> None:
    with pytest.raises(ValueError, match=f"^max_grad_norm should be > 0 but is: {value}$"):
        case.cls(make_params(SHAPES), max_grad_norm=value)


def _error_inputs() -> list:
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:  # it needs expecttest and numpy; the other tests need neither
        return []
    known = {case.stock: case for case in CASES}
    return [
        pytest.param(known[info.optim_cls], info, i, id=f"{known[info.optim_cls].name}-{i}")
        for info in optim_db
        if info.optim_cls in known
        for i, _ in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "info", "index"), _error_inputs())
def test_torchs_own_errors(case: Case, info: Any, index: int) -> None:
    def build(make: Callable[..., Optimizer]) -> Optimizer:
        error_input = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)[index].optimizer_error_input
        optimizer = make(error_input.params, **error_input.kwargs)
        optimizer.step()
        return optimizer

    ours, stock = outcomes(case, build)
    error = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)[index]
    if isinstance(stock, tuple):
        assert ours == stock
        assert stock[0] is error.error_type
    else:
        # torch's own test of it looks for a warning
        assert not isinstance(ours, tuple)

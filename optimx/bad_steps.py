"""Which parameter had the first infinite or NaN gradient."""

from __future__ import annotations

from torch.optim import Optimizer

from ._checks import check_instance
from ._engine.bad_gradients import BadStep, names_of
from ._engine.step import MultiTensorStep
from .composite import Composite

__all__ = ["last_bad"]


def last_bad(optimizer: Optimizer) -> BadStep | None:
    """Tell of the last step whose gradients were infinite or NaN; ``print`` it.

    Steps are looked at where there is a rule: ``skip_nonfinite``, ``skip_spikes``, or a ``max_grad_norm`` that is no
    number. Parameters have the names that their groups have (``param_names``; :func:`optimx.build` gives them), or
    their places. This waits for the device. A composite's own rules tell names where the gradients are on a CPU.

    Args:
        optimizer: An optimizer of optimx.

    Returns:
        The step; None if there was none, or nobody looked.

    Raises:
        TypeError: It is no optimizer of optimx.
    """
    if isinstance(optimizer, Composite):
        return optimizer._bad.last(names_of(optimizer))
    check_instance("optimizer", optimizer, MultiTensorStep, "an optimizer of optimx")
    assert isinstance(optimizer, MultiTensorStep)
    return optimizer._engine.bad.last(names_of(optimizer))

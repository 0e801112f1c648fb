"""Where projects put a warmup and a decay on the discrete steps of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from .._checks import one_of
from .schedule import serialisable


@serialisable
@dataclass(frozen=True)
class Convention:
    """Where a warmup of W steps and the decay after it lie on the discrete steps 0, 1, ..., N - 1 (N: the end).

    Args:
        warmup_from: ``"one"``: the first step has 1/W of a warmup from zero (one with a start factor begins with it);
            ``"zero"``: the first step has the start itself, so a warmup from zero wastes it.
        warmup_to: The warmup is complete on its ``"last"`` step, W - 1, or on the one ``"after"`` it, W.
        decay_from: The decay's progress is 0 on the ``"last"`` step of the phase before (without one, on its own
            first), or on the step ``"before"`` its first, with a phase there or not, or on the first, ``"after"`` the
            last of the phase before, or its clock runs from the ``"start"`` of the training.
        decay_to: Its progress is 1 right ``"after"`` the last step, at N, or on the ``"last"`` one, N - 1.
        target: A warmup ``"meet"``s the value with which the next phase begins, rises to the ``"peak"`` whatever
            comes next, or is a ``"product"`` with what the next phase has at the same step. Before phases of no steps
            it rises to the peak.
    """

    warmup_from: Literal["one", "zero"] = "one"
    warmup_to: Literal["last", "after"] = "last"
    decay_from: Literal["last", "before", "after", "start"] = "last"
    decay_to: Literal["after", "last"] = "after"
    target: Literal["meet", "peak", "product"] = "meet"

    def __post_init__(self) -> None:
        for name, choices in get_type_hints(type(self)).items():
            one_of(name, getattr(self, name), get_args(choices))


_FROM_ZERO = Convention("zero", "after", "after")

#: The conventions by name. Every project's numbers come out of them exactly.
CONVENTIONS: dict[str, Convention] = {
    "every-step": Convention(),
    "hf": _FROM_ZERO,
    # its cosine_warmup_with_min_lr, of all its schedules
    "hf-cosine-warmup": Convention("one", "last", "before", "last"),
    "megatron": _FROM_ZERO,
    "tf": _FROM_ZERO,
    "torchtitan": Convention("one", "last", "after"),
    "deepspeed": _FROM_ZERO,
    # its cosine counts differently from its linear decay
    "deepspeed-cosine": Convention("zero", "after", "before", "last"),
    "beit": Convention("zero", "last", "after"),
    "timm": Convention("zero", "after", "start", target="peak"),
    "timm-prefix": Convention("zero", "after", "after", target="peak"),
    "detectron2": Convention("zero", "after", "start"),
    "product": Convention("zero", "after", "start", target="product"),
}

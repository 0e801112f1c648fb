"""Weight decay that follows the learning rate otherwise than AdamW's, as schedules for :class:`ScheduleLR`.

AdamW multiplies weights by ``1 - lr * weight_decay`` in each step. Other decays are AdamW with another
``weight_decay``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._checks import above, told
from .endless import Constant
from .schedule import Schedule


def independent_decay(
    schedule: Schedule | Sequence[Schedule], max_lr: float | Sequence[float]
) -> dict[str, Schedule | Sequence[Schedule]]:
    """Weights are multiplied by ``1 - weight_decay * lr / max_lr``: how much they decay does not depend on ``max_lr``.

    ``ScheduleLR(optimizer, independent_decay(schedule, 3e-4))``; each group's ``weight_decay`` is then what weights
    lose in a step at ``max_lr``, such as 1e-5, and is divided by ``max_lr``.

    Args:
        schedule: Of the learning rate: a schedule, or one for each group.
        max_lr: The learning rate at factor 1, of all groups or of each, which is > 0.

    Returns:
        What :class:`ScheduleLR` takes: ``schedule`` for ``"lr"``, and constants for ``"weight_decay"``.

    Raises:
        ValueError: A learning rate is not > 0.
    """
    rates = [*max_lr] if isinstance(max_lr, Sequence) else [max_lr]
    for rate in rates:
        above(0).check("max_lr", rate)
    factors = [Constant(1.0 / rate) for rate in rates]
    return {"lr": schedule, "weight_decay": factors if isinstance(max_lr, Sequence) else factors[0]}


def corrected_decay(
    schedule: Schedule | Sequence[Schedule], normalized: Sequence[bool] | None = None
) -> dict[str, Schedule | Sequence[Schedule]]:
    """Weights are multiplied by ``1 - weight_decay * lr**2 / max_lr``: AdamC (https://arxiv.org/abs/2506.02285).

    ``weight_decay`` follows the learning rate's own schedule, so the ratio of gradients to weights of normalized layers
    does not rise towards the end of training. ``ScheduleLR(optimizer, corrected_decay(schedule))``.

    Args:
        schedule: Of the learning rate: a schedule, or one for each group.
        normalized: For each group, whether its weights are those of layers before a normalization, which alone the
            paper corrects; the others keep their ``weight_decay`` (default: None, all are).

    Returns:
        What :class:`ScheduleLR` takes: ``schedule`` for ``"lr"``, and schedules for ``"weight_decay"``.

    Raises:
        ValueError: A schedule has an absolute learning rate, which is no weight decay; or ``normalized`` is not one for
            each schedule.
    """
    schedules = [*schedule] if isinstance(schedule, Sequence) else [schedule]
    for each in schedules:
        if absolutes := each.absolutes:
            raise ValueError(told("schedule", "should have ratios alone for a corrected decay", absolutes[0]))
    if normalized is None:
        return {"lr": schedule, "weight_decay": schedule}
    if isinstance(schedule, Sequence) and len(schedules) != len(normalized):
        raise ValueError(told("normalized", f"should be {len(schedules)} bools, one a schedule,", normalized))
    of_groups = schedules if isinstance(schedule, Sequence) else schedules * len(normalized)
    decays = [each if chosen else Constant() for each, chosen in zip(of_groups, normalized, strict=True)]
    return {"lr": schedule, "weight_decay": decays}

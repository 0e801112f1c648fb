"""Gradients that are freed during backward: each bucket of parameters steps as soon as its gradients are complete."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from . import _compat
from ._checks import above, check_instance, one_of
from ._engine.step import MultiTensorStep
from ._released import EXACT, PREVIOUS, Released, Settings
from .composite import Composite

__all__ = ["Release", "release_gradients"]


def release_gradients(
    optimizer: Optimizer,
    bucket_mb: float = 25.0,
    *,
    norm: str = EXACT,
    scaler: torch.amp.GradScaler | None = None,
    local: bool = False,
) -> Release:
    """Let an optimizer update parameters during backward, and free their gradients at once.

    A bucket of parameters takes its step as soon as the last of its gradients is complete, in a hook. So there are
    never more gradients than one bucket's and the one that has just arrived, beside those of parameters that wait for
    others of their bucket. The loop stays ``loss.backward(); optimizer.step(); optimizer.zero_grad()``: ``step()``
    updates what is left, counts the step, runs hooks, and is what schedulers see. After it ``p.grad`` is None.

    Nobody finds gradients after backward: in place of ``clip_grad_norm_``, which would clip next to nothing, take
    ``max_grad_norm``.

    Parameters and states get the numbers, and the state dict has the entries, of a run without this. Learning rates and
    other settings of groups are read when a bucket steps: set them before backward.

    Some steps need something of all gradients before the first update. These keep their gradients until ``step()``, and
    are exact, but save no memory; a warning says so once, and :attr:`Release.kept_because` of each step:

    - ``max_grad_norm``, ``normalize_grads``, and rules that skip steps, unless a backward of its own has measured the
      gradients (:meth:`Release.measure`), or ``norm="previous"``;
    - a composite's ``max_grad_norm`` or rules, ``max_group_norm``, and hooks before the step;
    - steps that :func:`optimx.watch` measures, and all steps under a GradScaler.

    Args:
        optimizer: Of optimx, or a :class:`Composite` of such.
        bucket_mb: Megabytes (1e6 bytes) of gradients from which on parameters make a bucket, > 0 (default: 25). Smaller
            ones take more launches.
        norm: ``"exact"``: clip by the norm of the step's own gradients (default). ``"previous"``: by that of the step
            before, which is another algorithm: a sudden large gradient is not clipped until a step later. Gradients of
            the first step, and of those that are kept for another reason, are clipped by their own norm. Infinite and
            NaN norms are passed over.
        scaler: The GradScaler that multiplies the losses, torch's or optimx's (default: None). Whether a step is
            skipped is known when all gradients are, so its steps keep them.
        local: With several ranks, gradients of parameters that are no DTensors are complete where backward has computed
            them, as in stages of a pipeline (default: False). ``DistributedDataParallel`` averages them after hooks.

    Returns:
        What takes it back: ``remove()``, or the end of a ``with`` block.

    Raises:
        TypeError: ``optimizer`` is none of optimx, or a member of the composite is not.
        ValueError: The optimizer's gradients are released already; an argument is out of range; ``norm="previous"`` and
            the optimizer has rules, or normalizes; there are several ranks and parameters that are no DTensors, or
            FSDP1's flat ones.
    """
    members: list[Any] = [*optimizer.optimizers.values()] if isinstance(optimizer, Composite) else [optimizer]
    for member in members:
        check_instance("optimizer", member, MultiTensorStep, "an optimizer of optimx, or a Composite of such")
        if member._release is not None:
            raise ValueError(
                "optimizer should be one whose gradients are not released but they are: remove() comes first"
            )
    above(0).check("bucket_mb", bucket_mb)
    one_of("norm", norm, {EXACT: EXACT, PREVIOUS: PREVIOUS})
    if scaler is not None and norm != EXACT:
        raise ValueError(f"norm should be {EXACT!r} with a scaler but is: {norm!r}")
    settings = Settings(bucket_mb * 1e6, norm, scaler, local, weakref.ref(optimizer))
    release = Release(settings)
    if scaler is None:
        # a scaler that is not told of then tells the step of itself
        release._undo.enter_context(_compat.amp_scaling_support(optimizer, True))
    try:
        for member in members:
            release._members.append(Released(member, settings))
    except ValueError:
        release.remove()
        raise
    for member, released in zip(members, release._members, strict=True):
        member._release = released
    return release


class Release:
    """What :func:`release_gradients` returns: a context manager, at the end of which gradients stay again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._members: list[Released] = []
        self._undo = ExitStack()

    def __enter__(self) -> Release:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Give everything back: gradients stay until ``zero_grad``, and steps are the optimizer's own."""
        for released in self._members:
            released.remove()
        self._undo.close()

    @property
    def kept_because(self) -> str | None:
        """Why gradients of the last step were kept until ``step()``; None: they were freed during backward."""
        return next((each.kept_because for each in self._members if each.kept_because is not None), None)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """A context for every backward of a step but the last: gradients add up, and nothing is updated.

        What has accumulated is all there, as without a release; the last backward frees it bucket by bucket.
        """
        before, self._settings.accumulates = self._settings.accumulates, True
        try:
            yield
        finally:
            self._settings.accumulates = before

    @contextmanager
    def measure(self) -> Iterator[None]:
        """A context for a backward that only measures: gradients are freed, and the norm of all of them is kept.

        The next backward, of the same loss, then updates by the exact norm, and the step is skipped where the
        optimizer's rules want it. This takes the time of a backward more, and no more memory than one::

            with release.measure():
                loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()

        :func:`optimx.last_bad` is not told of such steps.

        Raises:
            RuntimeError: The optimizer needs no norm; gradients are there already, accumulated ones above all; they
                have to be kept for something else; or they have been measured.
        """
        if self._settings.accumulates or self._settings.measures:
            raise RuntimeError("measure() should be entered outside of accumulate() and measure() but is within one")
        if not any(each.needs_norm for each in self._members):
            raise RuntimeError("measure() should be entered with max_grad_norm, or rules, but the optimizer has none")
        self._settings.measures = True
        try:
            with ExitStack() as stack:
                for released in self._members:
                    stack.enter_context(released.measuring())
                yield
        finally:
            self._settings.measures = False

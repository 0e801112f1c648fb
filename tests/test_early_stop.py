"""EarlyStop: when it says to stop and why, what it takes, late metrics, checkpoints."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import optimx
from optimx import EarlyStop
from optimx.lr_scheduler.metric_follower import MetricFollower

NAN, INF = math.nan, math.inf


def stops_at(stop: EarlyStop, metrics: Sequence[Any]) -> int | None:
    """The index of the first metric that it stops for."""
    return next((i for i, metric in enumerate(metrics) if stop(metric)), None)


@pytest.mark.parametrize(
    ("options", "metrics", "expected"),
    [
        ({}, [3, 2, 2, 2, 2], 4),
        ({}, [3, 2, 2, 2, 1, 1, 1], None),
        ({"patience": 1}, [3, 3], 1),
        ({"mode": "max"}, [1, 2, 3, 2.9, 3, 2.8], 5),
        # each is better than the one before, none by the threshold
        ({"patience": 2, "threshold": 0.5}, [3, 2.9, 2.8], 2),
        ({"patience": 2, "threshold": 0.5}, [3, 2.6, 2.4, 2, 2], 4),
        ({"patience": 2, "threshold": 0.1, "threshold_mode": "rel"}, [30, 28, 26, 24, 23.5, 23], 4),
        # below zero a tenth is a tenth, too
        ({"patience": 1, "threshold": 0.1, "threshold_mode": "rel"}, [-1, -1.2, -1.25], 2),
        ({"patience": 1, "threshold": 0.1, "threshold_mode": "rel"}, [-1, -0.95], 1),
        ({"patience": 1, "threshold": 0.1, "threshold_mode": "rel", "mode": "max"}, [-1, -0.8, -0.79], 2),
        ({"patience": 1, "min_steps": 4}, [1, 1, 1, 1, 1], 4),
        ({"patience": 1, "min_steps": 4}, [1, 1, 1, 1, 0.5, 1], 5),
        ({}, [3, NAN], 1),
        ({"min_steps": 9}, [3, INF], 1),
        ({"mode": "max", "check_finite": False, "patience": 2}, [3, NAN, 4, NAN, NAN], 4),
        ({"check_finite": False, "patience": 2}, [NAN, NAN], 1),
    ],
)
def test_when_it_stops(options: dict[str, Any], metrics: list[float], expected: int | None) -> None:
    assert stops_at(EarlyStop(**options), metrics) == expected
    assert stops_at(EarlyStop(**options), [torch.tensor([metric]) for metric in metrics]) == expected


def test_best_and_why() -> None:
    stop = EarlyStop(patience=2)
    assert (stop.best, stop.best_step, stop.reason) == (INF, None, None)
    assert [stop(metric, 100 * (i + 1)) for i, metric in enumerate([3, 2, 2, 4])] == [False, False, False, True]
    assert (stop.best, stop.best_step) == (2, 200)
    assert stop.reason == "2 metrics in a row are not better than 2, that of step 200"
    # who goes on nevertheless is told anew
    assert not stop(1.5)
    assert (stop.best, stop.best_step, stop.reason) == (1.5, 401, None)
    assert stop(NAN)
    assert stop.reason == "the metric of step 402 is nan"
    assert stop.best == 1.5
    highest = EarlyStop("max")
    assert highest(INF)
    assert highest.best == -INF
    blind = EarlyStop(patience=1, check_finite=False)
    assert blind(NAN)
    assert blind.reason == "1 metrics in a row are not better than inf"


def test_cooldown() -> None:
    stop = EarlyStop(patience=2, cooldown=2)
    assert not any(map(stop, (3, 2, 2)))
    stop.start_cooldown()
    assert not any(map(stop, (9, 1, 1)))
    assert (stop.best, stop.best_step) == (1, 4)
    assert stop(1)
    stop.start_cooldown()
    assert [stop(9) for _ in range(4)] == [False, False, False, True]


def test_a_late_metric_is_that_of_the_call_before() -> None:
    stop = EarlyStop(patience=2, late=True)
    metric = torch.tensor(3.0)
    answers = []
    for value in (3.0, 2.0, 2.0, 2.0):
        # a loop that keeps its loss in one tensor
        metric.fill_(value)
        answers.append(stop(metric))
    assert answers == [False] * 4
    assert stop.best_step == 1
    assert stop.flush()
    assert stop.reason == "2 metrics in a row are not better than 2, that of step 1"
    assert stop.flush()
    assert EarlyStop(late=True).flush() is False


@pytest.mark.parametrize("late", [False, True])
def test_resume(late: bool) -> None:
    metrics = [5.0, 4, 4, 3, 3.5, NAN, 3, 3]

    def make() -> EarlyStop:
        return EarlyStop(patience=3, cooldown=1, check_finite=False, late=late)

    def go_on(stop: EarlyStop, first: int, end: int) -> list[Any]:
        found = []
        for i in range(first, end):
            if i == 2:
                stop.start_cooldown()
            found.append((stop(metrics[i]), stop.best, stop.best_step, stop.reason))
        return found

    whole = go_on(make(), 0, len(metrics))
    assert [told for told, *_ in whole].count(True) == (2 if late else 3) - 1
    for done in range(len(metrics)):
        first = make()
        go_on(first, 0, done)
        again = make()
        again.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert go_on(again, done, len(metrics)) == whole[done:]


def test_other_patience_after_a_checkpoint() -> None:
    stop = EarlyStop(patience=1)
    assert stops_at(stop, [1, 1]) == 1
    longer = EarlyStop(patience=3)
    longer.load_state_dict(stop.state_dict())
    assert longer.reason == stop.reason is not None
    assert stops_at(longer, [1, 1]) == 1


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "mode": (lambda: EarlyStop("mim"), ValueError, "'mim'; did you mean 'min'"),  # type: ignore
    "patience": (lambda: EarlyStop(patience=0), ValueError, "patience should be >= 1 but is: 0"),
    "threshold": (lambda: EarlyStop(threshold=-1), ValueError, "threshold should be >= 0 but is: -1"),
    "threshold-mode": (lambda: EarlyStop(threshold_mode="rell"), ValueError, "did you mean 'rel'"),  # type: ignore
    "cooldown": (lambda: EarlyStop(cooldown=1.5), TypeError, "cooldown should be a whole number but is: 1.5"),  # type: ignore
    "min-steps": (lambda: EarlyStop(min_steps=-1), ValueError, "min_steps should be >= 0 but is: -1"),
    "text": (lambda: EarlyStop()("0.5"), TypeError, "metric should be a number but is: '0.5'"),  # type: ignore
    "several": (lambda: EarlyStop()(torch.ones(2)), ValueError, "metric should have one element but has: 2"),
    "step": (lambda: EarlyStop()(0.5, -1), ValueError, "step should be >= 0 but is: -1"),
    "other-keys": (lambda: EarlyStop().load_state_dict({"best": 1}), ValueError, r"has the keys: \['best'\]"),
    "other-mode": (
        lambda: EarlyStop().load_state_dict(EarlyStop("max").state_dict()),
        ValueError,
        "mode should be 'max', as in the checkpoint, but is: 'min'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_refused_metric_changes_nothing() -> None:
    stop = EarlyStop(late=True)
    stop(3.0)
    before = stop.state_dict()
    for wrong in ("x", torch.ones(3)):
        with pytest.raises((TypeError, ValueError)):
            stop(wrong)  # type: ignore[arg-type]
    assert stop.state_dict() == before


def test_one_count_for_all() -> None:
    assert issubclass(EarlyStop, MetricFollower)
    assert issubclass(optimx.lr_scheduler.GreedyLR, MetricFollower)

"""Successive halving (https://arxiv.org/abs/1502.07943): the best third of the trainings goes on, three times as long.

    python -m examples.successive_halving [TRAININGS]

Nine trainings of 1 epoch, three of which go on to 3 and one to 9, are 21 epochs in all, where nine whole ones are 81.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import optimx
from examples.digits import CONFIG, EPOCHS, Training


def main(trainings: int = 9, factor: int = 3) -> tuple[float, dict[str, Any]]:
    candidates = [(overrides, Training(overrides)) for overrides in optimx.search.sample(CONFIG, trainings, seed=0)]
    done, rung = 0, 1
    while True:
        rung = EPOCHS if len(candidates) == 1 else min(rung, EPOCHS)
        losses = [[training.epoch() for _ in range(done, rung)][-1] for _, training in candidates]
        # one that is NaN is no number to sort by
        losses = [math.inf if math.isnan(loss) else loss for loss in losses]
        ranking = sorted(range(len(candidates)), key=losses.__getitem__)
        best = candidates[ranking[0]][0]
        print(f"{len(candidates)} trainings after {rung} epochs: best loss {losses[ranking[0]]:.4f} with {best}")
        if rung == EPOCHS:
            return losses[ranking[0]], best
        candidates = [candidates[i] for i in ranking[: max(len(ranking) // factor, 1)]]
        done, rung = rung, rung * factor


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

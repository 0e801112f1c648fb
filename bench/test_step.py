"""The cases under pytest-benchmark: ``python -m pytest bench --benchmark-only``.

``bench.run`` lets contestants take turns and is what ratios are quoted from; here each is timed by itself, with what
pytest-benchmark brings: comparison between runs, histograms, ``-k``.
"""

from collections.abc import Iterator

import pytest
import torch

from bench.cases import CASES, Case
from bench.timing import CPU_THREADS, WARMUP, synchronize

ROUNDS = 20


def contests() -> list:
    contests = []
    for case in CASES:
        absent = case.device == "cuda" and not torch.cuda.is_available()
        marks = [pytest.mark.gpu] * (case.device == "cuda") + [pytest.mark.skip("needs a GPU")] * absent
        for name in case.contestants:
            name_id = f"{case.name}-{name}".replace(", ", "-").replace(" ", "-")
            contests.append(pytest.param(case, name, marks=marks, id=name_id))
    return contests


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "contestant"), contests())
def test_step(benchmark, case: Case, contestant: str) -> None:
    run = case.contestants[contestant](case)

    def setup() -> None:
        run.prepare()
        synchronize()

    def step() -> None:
        run.step()
        if case.clock != "host":
            synchronize()

    benchmark.group = case.name
    benchmark.pedantic(step, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP)

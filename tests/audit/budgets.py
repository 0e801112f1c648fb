"""How many machine instructions a thread may execute for an element, see `walk.py`: a fifth more than it does.

A division that is correctly rounded takes 11 of them, a root 10. gfx942 has no instruction that rounds to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from triton.backends.compiler import GPUTarget

#: Of a kernel, in 32, 16 and 64 bits; mixed dtypes count as 16.
BUDGETS = {
    "cuda": {
        "adam": (54, 60, 125),
        "sgd": (9.3, 18, 13),
        "rmsprop": (49, 54, 78),
        "adagrad": (42, 43, 67),
        "adadelta": (61, 65, 97),
        "adamax": (31, 37, 69),
        "nadam": (61, 63, 100),
        "radam": (51, 53, 78),
        "rprop": (31, 36, 40),
        "asgd": (11, 19, 17),
        "lion": (14, 21, 18),
        "schedule_free_adamw": (58, 62, 96),
        "schedule_free_sgd": (9.3, 18, 13),
        "lamb": (50, 56, 96),
        "lamb_measure": (50, 55, 95),
        "adafactor_sums": (25, 28, 42),
        "adafactor_update": (38, 38, 93),
        "norm": (5.7, 9.3, 34),
        "scale": (2, 4.1, 2.6),
    },
    "hip": {
        "adam": (59, 93, 83),
        "sgd": (8, 27, 16),
        "rmsprop": (48, 84, 64),
        "adagrad": (42, 62, 52),
        "adadelta": (70, 97, 83),
        "adamax": (30, 57, 39),
        "nadam": (62, 88, 77),
        "radam": (48, 77, 63),
        "rprop": (31, 57, 46),
        "asgd": (9, 27, 18),
        "lion": (11, 30, 21),
        "schedule_free_adamw": (63, 86, 77),
        "schedule_free_sgd": (7.5, 28, 15),
        "lamb": (53, 78, 74),
        "lamb_measure": (50, 53, 74),
        "adafactor_sums": (26, 28, 54),
        "adafactor_update": (43, 49, 62),
        # on gfx942 Triton 3.6 needs 8.3 and 13.2 for the infinity norm, 3.9 needs 6 and 8.8
        "norm": (10, 16, 13),
        "scale": (1.9, 10, 3.5),
    },
}


#: Of an elementwise kernel that nobody has measured yet: the most that one above has. It may divide and take roots as
#: often as the dearest does; widths, registers and spills are checked as for all.
DEFAULT = {backend: tuple(map(max, zip(*budgets.values(), strict=True))) for backend, budgets in BUDGETS.items()}


#: What cautious steps, or cautious decay, may take besides.
CAUTIOUS = 11
#: What the largest gradient and the number of zeros may take besides their norm.
WATCHED = 6


def instructions(kernel: str, target: GPUTarget, dtypes: Iterable[torch.dtype]) -> float:
    """The budget of a kernel on tensors of these dtypes."""
    in_32, in_16, in_64 = BUDGETS[target.backend].get(kernel, DEFAULT[target.backend])
    sizes = {dtype.itemsize for dtype in dtypes}
    return in_64 if 8 in sizes else in_16 if 2 in sizes else in_32


#: What a thread executes to keep an element otherwise, a fifth more than it does: of the parameter, and of a state.
CODECS = {
    "cuda": {"nearest": 0, "float32": 0, "bfloat16": 0, "stochastic": 20, "float16": 25, "remainder8": 14,
             "remainder16": 11, "master": 2, "8bit": 22},
    "hip": {"nearest": 0, "float32": 0, "bfloat16": 0, "stochastic": 20, "float16": 35, "remainder8": 14,
            "remainder16": 11, "master": 2, "8bit": 25},
}  # fmt: skip
#: Of AdamW, what an H100 has time for while it moves the bytes of the scheme.
STEPS = {("adam", "stochastic-8bit"): 86.0, ("adam", "remainder16-float32"): 52.0}


def of_scheme(kernel: str, target: GPUTarget, scheme: str) -> float:
    """The budget of a kernel whose roles are kept in a scheme of :mod:`tests.audit.storage`."""
    if target.backend == "cuda" and target.arch == 90 and (kernel, scheme) in STEPS:
        return STEPS[kernel, scheme]
    param, state = scheme.split("-")
    codecs = CODECS[target.backend]
    n_states = {"sgd": 1, "lion": 1, "schedule_free_sgd": 1, "adafactor_sums": 0, "adafactor_update": 1}.get(kernel, 3)
    return instructions(kernel, target, [torch.bfloat16]) + codecs[param] + n_states * codecs[state]


#: What a thread executes for a sum and for an average that ride along, a fifth more than it does.
RIDERS = {"cuda": (2.6, 6.7), "hip": (1.3, 4.1)}


def of_riders(target: GPUTarget, n_sums: int, n_averages: int) -> float:
    """What an update may execute besides for what rides along."""
    of_sum, of_average = RIDERS[target.backend]
    return n_sums * of_sum + n_averages * of_average

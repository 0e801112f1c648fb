"""Checkpoints of transformers' Adafactor, read as ours."""

from __future__ import annotations

from typing import Any

import torch

from . import _compat

#: Where a relative step size begins, in transformers a constant.
RELATIVE_LR = 1e-2


def is_of_transformers(state_dict: dict[str, Any]) -> bool:
    """Whether transformers' Adafactor gave this state dict; torch and we have another word for ``decay_rate``."""
    return any("decay_rate" in group for group in state_dict["param_groups"])


def from_transformers(state_dict: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A state dict of transformers' Adafactor in our terms."""
    states = {}
    for index, saved in state_dict["state"].items():
        state = {"step": torch.tensor(float(saved["step"]), dtype=_compat.scalar_dtype(False), device="cpu")}
        if "exp_avg_sq_row" in saved:
            state["row_var"] = saved["exp_avg_sq_row"].unsqueeze(-1)
            state["col_var"] = saved["exp_avg_sq_col"].unsqueeze(-2)
        else:
            state["variance"] = saved["exp_avg_sq"]
        if "exp_avg" in saved:
            state["exp_avg"] = saved["exp_avg"]
        states[index] = state
    groups = []
    for saved in state_dict["param_groups"]:
        group = {**defaults, **saved, "d": saved["clip_threshold"], "beta2_decay": saved["decay_rate"], "variant": "hf"}
        # schedules that report step sizes leave them there, where nobody reads them
        if saved["relative_step"]:
            group["lr"] = RELATIVE_LR
        del group["clip_threshold"], group["decay_rate"]
        groups.append(group)
    return {**state_dict, "state": states, "param_groups": groups}

"""Configs of other projects as ours: timm's arguments, detectron2's SOLVER, Hugging Face's TrainingArguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..config.errors import ConfigError, Problem, nearest
from .detectron2 import detectron2
from .hugging_face import hugging_face
from .source import Conversion, Source
from .timm import timm

__all__ = ["Conversion", "convert"]

_PROJECTS: dict[str, tuple[Callable[[Source], Conversion], set[str], re.Pattern[str]]] = {
    "detectron2": (detectron2, {"SOLVER"}, re.compile("(?!)")),
    "hf": (
        hugging_face,
        {"learning_rate", "lr_scheduler_type", "num_train_epochs", "adam_beta1"},
        re.compile("optim|lr_|learning|adam_|weight_decay|warmup|max_grad"),
    ),
    "timm": (
        timm,
        {"opt", "sched", "warmup_epochs"},
        re.compile("opt|lr_|sched|decay_|warmup|cooldown|patience|clip_|layer_decay|momentum|weight_decay"),
    ),
}


def convert(theirs: Mapping[str, Any], project: str | None = None) -> Conversion:
    """A config of another project as one of ours.

    Args:
        theirs: Its values by name, as its own files have them.
        project: ``"timm"``, ``"detectron2"`` or ``"hf"`` (default: None, told by the names).

    Raises:
        ConfigError: The project is unknown, or there is no counterpart of its optimizer or schedule.
    """
    if project is None:
        project = next((name for name, (_, sign, _) in _PROJECTS.items() if sign & theirs.keys()), None)
    if project not in _PROJECTS:
        near = nearest(project, _PROJECTS) if project else None
        raise ConfigError([Problem("project", f"should be one of {', '.join(_PROJECTS)}", project, near)])
    function, _, about_training = _PROJECTS[project]
    source = Source(theirs)
    try:
        conversion = function(source)
    except ConfigError:
        raise
    # theirs is anybody's: a number that is a string, a table that is a number
    except Exception as error:
        raise ConfigError(
            [Problem(project, f"cannot be converted ({type(error).__name__}: {error})", theirs)]
        ) from error
    for key in source.left(about_training):
        conversion.notes.append(f"not converted: {key} = {source.values[key]!r}")
    conversion.config = {name: section for name, section in conversion.config.items() if section}
    return conversion

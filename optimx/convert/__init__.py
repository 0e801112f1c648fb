"""Configs of other projects as ours: timm's arguments, detectron2's SOLVER, Hugging Face's TrainingArguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._checks import nearest
from ..config.errors import MISSING, ConfigError, Problem
from ..config.files import Tagged
from .projects import PROJECTS, look_alike, recognised, unknown_keys
from .source import Conversion, Source, refused

__all__ = ["Conversion", "convert"]


def convert(theirs: Mapping[str, Any] | Tagged, project: str | None = None) -> Conversion:
    """A config of another project as one of ours.

    Args:
        theirs: Its values by name, as its own files have them; what :func:`~optimx.config.files.read_file` returns.
        project: ``"timm"``, ``"detectron2"`` or ``"hf"`` (default: None, told by the names).

    Raises:
        ConfigError: The project is unknown, or there is no counterpart of its optimizer or schedule.
    """
    # a dump of argparse.Namespace or of TrainingArguments
    theirs = theirs.value if isinstance(theirs, Tagged) else theirs
    name = _project(theirs, project)
    function, about = PROJECTS[name].convert, PROJECTS[name].about
    source = Source(theirs)
    try:
        conversion = function(source)
    except ConfigError:
        raise
    # theirs may be anything: a table that is a number, a ratio to a learning rate of zero
    except Exception as error:
        raise refused(name, f"cannot be converted ({type(error).__name__}: {error})", dict(theirs)) from error
    conversion.notes[:0] = source.left(about)
    conversion.config = {section: value for section, value in conversion.config.items() if value}
    return conversion


def _project(theirs: Any, project: str | None) -> str:
    """The project that is told, or that the keys tell; ConfigError if it is none of ours."""
    names = ", ".join(PROJECTS)
    if project is not None and project not in PROJECTS:
        raise ConfigError.of("project", f"should be one of {names}", project, nearest(project, PROJECTS))
    if not isinstance(theirs, Mapping):
        raise refused("theirs", "should be a table", theirs)
    if other := look_alike(theirs):
        raise refused("project", f"should be one of {names}, but the keys of this config are {other}", MISSING)
    if project is not None:
        return project
    found = recognised(theirs)
    told = f"should be told (--from, or project=) as one of {names}"
    if found is None:
        raise refused("project", f"{told}, as the keys of this config are those of none of them", MISSING)
    if strange := unknown_keys(theirs, PROJECTS[found]):
        raise refused("project", f"{told}, as some keys are those of {found}, but not {', '.join(strange)}", MISSING)
    return found

"""From a model and a config to a training set-up."""

from .build import Build, build

__all__ = ["Build", "build"]

"""A typed config: its sections, every format it comes in, and all that is wrong with one at once."""

from .errors import ConfigError, Problem
from .sections import (
    AdamWConfig,
    BatchScalingConfig,
    Config,
    GroupsConfig,
    OptimizerConfig,
    ScheduleConfig,
    SearchRange,
)

__all__ = [
    "AdamWConfig",
    "BatchScalingConfig",
    "Config",
    "ConfigError",
    "GroupsConfig",
    "OptimizerConfig",
    "Problem",
    "ScheduleConfig",
    "SearchRange",
]

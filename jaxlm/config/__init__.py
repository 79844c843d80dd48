"""What each key means, which values go together, and where they come from: files and command lines.

This room imports nothing else of jaxlm, and neither jax nor TensorFlow: a wrong key is refused before anything slow is
imported. The names below are for every room.
"""

from jaxlm.config.schema import (
    BEFORE,
    FILE_SOURCES,
    MAX_FLOAT,
    MAX_INT,
    MIN_FLOAT,
    OWN,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OwnFloat,
    ParallelConfig,
    UserError,
    changes,
    describe,
    flatten,
    key_types,
    mixture,
    sections,
    show,
)

__all__ = [
    "BEFORE", "FILE_SOURCES", "MAX_FLOAT", "MAX_INT", "MIN_FLOAT", "OWN", "CheckpointConfig", "Config",
    "DataConfig", "EvalConfig", "LogConfig", "LossConfig", "ModelConfig", "OptimConfig", "OwnFloat",
    "ParallelConfig", "UserError", "changes", "describe", "flatten", "key_types", "mixture", "sections",
    "show",
]  # fmt: skip

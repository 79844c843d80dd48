"""What each key means, which values fit together, and where values come from: files, command lines, other runs.

Nothing here imports JAX or TensorFlow, so a wrong key is refused before anything slow is imported. Other rooms import
the names below from this package, and `cli`, `files`, `paths`, `keys` and `pretrained` as modules.

May import: nothing.
"""

from jaxlm.config.changes import changes
from jaxlm.config.mixtures import mixture
from jaxlm.config.schema import (
    BEFORE,
    MAX_FLOAT,
    MAX_INT,
    MIN_FLOAT,
    OF_WHOLE_GRADIENTS,
    OWN,
    STACKS,
    WITHOUT_PARTS,
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
    describe,
    flatten,
    key_types,
    refused_reductions,
    sections,
    show,
)
from jaxlm.config.sources import SOURCES

__all__ = [
    "BEFORE",
    "MAX_FLOAT",
    "MAX_INT",
    "MIN_FLOAT",
    "OF_WHOLE_GRADIENTS",
    "OWN",
    "SOURCES",
    "STACKS",
    "WITHOUT_PARTS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "OwnFloat",
    "ParallelConfig",
    "UserError",
    "changes",
    "describe",
    "flatten",
    "key_types",
    "mixture",
    "refused_reductions",
    "sections",
    "show",
]

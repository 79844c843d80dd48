"""What a run that resumes may change."""

import re
from typing import Any

from jaxlm.config.mixtures import mixture
from jaxlm.config.schema import Config, DataConfig, flatten

# Keys that a resumed run may change, because they do not change the meaning of the steps so far.
CHANGEABLE = (
    r"steps|deterministic|optim\.(?!(name|freeze)$).*|loss\..*|parallel\..*|eval\..*|checkpoint\..*|log\..*"
    r"|model\.(dtype|dropout|lora_dropout|remat|attention|matmul_precision|scan_unroll)|data\.cache_dir"
)

# Keys that say where the data is. A resumed run may change them if the data's fingerprint stays the same; in a mixture,
# only the paths may change.
PLACES = r"data\.(path|val_path|tokenizer_path|mixture)"


def changes(old: Config, new: Config) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """The keys whose values differ, as two dicts {key: (old, new)}: changes that a resumed run may make, and changes
    that it may not make. Changes of PLACES are among the first unless a mixture's weights or sources differ; the caller
    compares the data's fingerprint.
    """
    a, b = flatten(old), flatten(new)
    differ = {k: (a[k], b[k]) for k in a if a[k] != b[k]}
    allowed = CHANGEABLE if _kinds(old.data) != _kinds(new.data) else f"{CHANGEABLE}|{PLACES}"
    free = {k: v for k, v in differ.items() if re.fullmatch(allowed, k)}
    return free, {k: v for k, v in differ.items() if k not in free}


def _kinds(data: DataConfig) -> list[tuple[float, str, str]]:
    """The weight, source and TFDS name of each part of a mixture: all but the paths of files. Empty without one."""
    return [(weight, part.source, part.tfds_name) for weight, part in mixture(data)] if data.mixture else []

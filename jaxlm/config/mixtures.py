"""The text of `data.mixture`."""

import dataclasses
import re
from typing import Any

from jaxlm.config.schema import MAX_FLOAT, MIN_FLOAT, DataConfig, UserError, show
from jaxlm.config.sources import SOURCES


def mixture(data: DataConfig) -> list[tuple[float, DataConfig]]:
    """The sources of `data.mixture`: the weight of each, and a copy of `data` with that source (and the same mixture).

    Raises:
      UserError: a part of the mixture is wrong; the message names the part.
    """
    found, names = [], [name for name, kind in SOURCES.items() if kind.mixed]
    for part in data.mixture.rstrip("; ").split(";"):
        weight, source, path = ([*part.split(maxsplit=2), "", "", ""])[:3]
        allowed = (
            "WEIGHT SOURCE [PATH]; ... where each weight is a number of more than 0, without %, and each source one of "
            + ", ".join(names)
        )
        kind = SOURCES[source] if source in names else None
        number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight)
        if not number or not MIN_FLOAT <= float(weight) <= MAX_FLOAT or kind is None:
            raise UserError(f"data.mixture has {show(part.strip())}; allowed: {allowed}")
        needs_path = kind.named_by != "source"
        if bool(path) != needs_path:
            what = "a path (tfds: a name) after it" if needs_path else "no path after it"
            raise UserError(f"data.mixture has {show(part.strip())}; allowed with {source}: {what}")
        keys: dict[str, Any] = {kind.named_by: path} if path else {}
        own = dataclasses.replace(data, source=source, val_path="", **keys)
        found.append((float(weight), own))
    return found

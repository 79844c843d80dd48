"""What each optimizer takes for a key that nobody has set: values that train well, measured in docs/optimizers.md."""

import dataclasses

from jaxlm.config import Config

_COMMON = {"weight_decay": 0.0, "b1": 0.9, "b2": 0.95, "momentum": 0.95}
OWN_VALUES: dict[str, dict[str, float]] = {
    "muon": _COMMON | {"lr": 0.02},  # docs/recipe.md
    "adamw": _COMMON | {"lr": 0.004, "weight_decay": 0.1},  # b2 as for GPT-3, whose batches are as noisy
    "lion": _COMMON | {"lr": 0.0006, "b2": 0.99, "weight_decay": 0.5},  # Chen et al., section 5
    "adafactor": _COMMON | {"lr": 0.008, "weight_decay": 0.1},
    "sgd": _COMMON | {"lr": 1.0, "momentum": 0.9},
}


def with_own_values(config: Config) -> Config:
    """The configuration with the optimizer's own value for each key that has none yet.

    An unknown optimizer has none: `validate` refuses it.
    """
    optim = config.optim
    own = OWN_VALUES.get(optim.name, {}) if isinstance(optim.name, str) else {}
    unset = {key: value for key, value in own.items() if getattr(optim, key) is None}
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **unset)) if unset else config

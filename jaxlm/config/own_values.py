"""Each optimizer's own values for keys that are left OWN; docs/optimizers.md has the measurements."""

from typing import Literal

from jaxlm.config import OptimConfig

Peak = Literal["lr", "adam_lr", "embed_lr"]  # keys of peak learning rates
# {optim.name: the peak rates that it reads}
PEAKS: dict[str, tuple[Peak, ...]] = {
    "muon": ("lr", "adam_lr", "embed_lr"),
    "adamw": ("lr",),
    "lion": ("lr",),
    "adafactor": ("lr",),
    "sgd": ("lr",),
}
# Every optimizer sets these, even those it does not read, because config.json has a value for every key.
_COMMON = {"weight_decay": 0.0, "b1": 0.9, "b2": 0.95, "momentum": 0.95}
OWN_VALUES: dict[str, dict[str, float]] = {
    "muon": _COMMON | {"lr": 0.02},  # docs/recipe.md
    "adamw": _COMMON | {"lr": 0.004, "weight_decay": 0.1},
    "lion": _COMMON | {"lr": 0.001, "weight_decay": 0.3, "b2": 0.99},  # Chen et al., section 5
    "adafactor": _COMMON | {"lr": 0.003, "weight_decay": 0.1},
    "sgd": _COMMON | {"lr": 0.3, "momentum": 0.9},
}


def set_own_values(optim: OptimConfig) -> None:
    """Replaces OWN by the optimizer's own values. Does nothing for an unknown optimizer, which `validate` refuses."""
    own = OWN_VALUES.get(optim.name, {}) if isinstance(optim.name, str) else {}
    for key, value in own.items():
        if getattr(optim, key) is None:
            setattr(optim, key, value)

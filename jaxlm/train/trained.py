"""Which parameters a run trains. The others are frozen: they get no gradient, no optimizer state and no moving average.

A tree of the trained parameters is the tree of all without the other leaves. Gradients, reductions and optimizers see a
smaller model, and need not know about frozen parameters.
"""

import re
from collections.abc import Callable
from typing import Any

from jaxlm import model
from jaxlm.config import STACKS, Config, UserError, show
from jaxlm.model import Params
from jaxlm.model.lora import A, B


def trains(config: Config, name: str) -> bool:
    """Whether a run trains the parameter of this name, such as layers/mlp/up/kernel."""
    if config.optim.freeze:
        return re.search(config.optim.freeze, name) is None
    return not config.model.lora_rank or name.endswith((A, B))


def part(config: Config, params: Params) -> Params:
    """The parameters that a run trains. The tree has the keys of all stacks, even if none of their layers is there."""

    def chosen(tree: Any, prefix: str) -> Any:
        found = {}
        for key, x in tree.items():
            name = prefix + key
            if isinstance(x, dict):
                if below := chosen(x, f"{name}/"):
                    found[key] = below
            elif trains(config, name):
                found[key] = x
        return found

    return {key: {} for key in params if key in STACKS} | chosen(params, "")


def check(config: Config, params: Params) -> None:
    """Raises UserError if `optim.freeze` freezes none or all of the parameters."""
    trained = part(config, params)
    found = "none" if not without(params, trained) else "all" if not any(trained.values()) else ""
    if found and config.optim.freeze:
        raise UserError(
            f"optim.freeze is {show(config.optim.freeze)}, which matches {found} of the parameters' names; allowed: a"
            " regular expression of some of them (`jaxlm show` lists them)"
        )


def flops_per_token(config: Config, params: Params) -> float:
    """Floating-point operations for one training token: those of the model, without the gradients of frozen weights,
    which are a third of what their products take.
    """
    frozen = without(params, part(config, params))
    whole = model.flops_per_token(config.model, params, config.seq_len)
    return whole - 2 * model.multiplied(config.model, frozen, config.seq_len)


def within(tree: Params, some: Params) -> Params:
    """The leaves of a tree that another tree has, too."""
    return _where(tree, some, lambda there: there)


def without(tree: Params, some: Params) -> Params:
    """The leaves of a tree that the other tree does not have."""
    return _where(tree, some, lambda there: not there)


def joined(a: Params, b: Params) -> Params:
    """One tree of two; where both have a leaf, it is that of `b`."""
    return a | {k: joined(a[k], x) if k in a and isinstance(x, dict) else x for k, x in b.items()}


def _where(tree: Any, some: Any, wanted: Callable[[bool], bool]) -> Any:
    found = {}
    for key, x in tree.items():
        if isinstance(x, dict):
            if below := _where(x, some.get(key, {}), wanted):
                found[key] = below
        elif wanted(key in some):
            found[key] = x
    return found

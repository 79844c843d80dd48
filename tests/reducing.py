"""Reduces random gradients under pmap, and checks the result of each device."""

import dataclasses
import importlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import WITHOUT_PARTS, ParallelConfig
from jaxlm.config.files import load
from jaxlm.sync import REDUCTIONS, Group, make_sync
from tests.runs import CONFIG

AXIS = "d"
RING = importlib.import_module("jaxlm.sync.ring")  # by name, because jaxlm.sync.ring is also a function
EPS = float(np.finfo(np.float32).eps)
BASE = load(CONFIG).parallel
# Shapes like those of a model, with sizes that no number of devices divides.
SHAPES = {
    "embed": {"embedding": (50, 21)},
    "final_norm": {"scale": (21,)},
    "layers": {"mlp": {"kernel": (3, 21, 44)}, "norm": {"scale": (3, 21)}},
}
EXACT = ("pmean", "ring")
LOSSY = tuple(name for name in REDUCTIONS if name not in EXACT)
SHARDED = tuple(name for name in REDUCTIONS if name not in WITHOUT_PARTS)  # the reductions that work with ZeRO-1
GROUPS = [(2, None), (3, None), (8, None), (2, ((0, 3), (5, 1), (4, 2)))]


def parallel(reduce: str, **keys: Any) -> ParallelConfig:
    return dataclasses.replace(BASE, **{"reduce": reduce, **keys})


def draw(devices: int, seed: int, shapes: Any = SHAPES) -> Any:
    """Draws gradients for each device. As in training, tensors differ by orders of magnitude."""
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> np.ndarray:
        return (10.0 ** rng.uniform(-6, 0) * rng.normal(size=(devices, *shape))).astype(np.float32)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


class Result(NamedTuple):
    means: Any  # [devices, ...]
    state: Any
    norms: np.ndarray


COMPILED: dict[Any, Any] = {}


def reduce(config: ParallelConfig, group: Group, grads: Any, state: Any = None) -> Result:
    """Returns the whole result that each device has after a reduction."""
    devices = len(jax.tree.leaves(grads)[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), grads)
    sync = make_sync(config, group, like)
    key = (str(config), group, str(like), RING.BOTH_WAYS)
    if key not in COMPILED:

        def one(grads: Any, state: Any) -> Any:
            means, state = sync.reduce(grads, state)
            return sync.whole(means), state, sync.global_norm(means)

        COMPILED[key] = jax.pmap(one, axis_name=AXIS, devices=jax.devices()[:devices])
    if state is None:
        state = sync.init(jax.tree.map(lambda x: x[0], grads))
        state = jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), state)
    return Result(*jax.device_get(COMPILED[key](grads, state)))


def groups_of(group: Group, devices: int) -> list[list[int]]:
    return [list(range(devices))] if group.members is None else [list(m) for m in group.members]


def check_same_everywhere(result: Result, group: Group) -> None:
    """Checks that all devices of a group have the same bits, because replicas that differ drift apart."""
    for leaf in [*jax.tree.leaves(result.means), result.norms]:
        for members in groups_of(group, len(leaf)):
            for device in members:
                np.testing.assert_array_equal(leaf[device], leaf[members[0]])


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): np.asarray(x) for path, x in leaves}


def add(total: Any, tree: Any) -> Any:
    tree = jax.tree.map(lambda x: x.astype(np.float64), tree)
    return tree if total is None else jax.tree.map(np.add, total, tree)

"""Devices share an optimizer's work on whole layers, such as Muon's orthogonalization of every matrix.

Without ZeRO every device holds all momenta. The n devices of a *host* share: each takes ceil(L / n) of the L layers,
and an all-gather, in memory or over NVLink, brings the results to all of them. With ZeRO-1 a device holds its part of
every layer: an all-to-all turns these into whole layers, ceil(L / N) on each device, and another returns the results.
If L is not divisible, the last devices get layers of zeros. Where a tensor group divides each layer, its devices first
exchange parts for whole layers, in the same way (cuts.py).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.sync.cuts import Cuts
from jaxlm.sync.group import Group
from jaxlm.sync.zero import Zero

LAYERS = "share_layers"  # names its collectives in a compiled program


Act = Callable[[jax.Array], jax.Array]


class LayerSharing(NamedTuple):
    # (path of a parameter, its layers or this device's parts of them, function of whole layers) -> results, cut alike
    on_layers: Callable[[Any, jax.Array, Act], jax.Array]
    zero: Zero | None
    cuts: Cuts | None

    @property
    def in_parts(self) -> bool:
        return self.zero is not None or self.cuts is not None

    def whole(self, parts: Any) -> Any:
        """Gathers whole parameters, or arrays of their shapes, from this device's parts."""
        parts = self.zero.whole(parts) if self.zero else parts
        return self.cuts.whole(parts) if self.cuts else parts

    def own(self, tree: Any) -> Any:
        """The inverse of `whole`."""
        tree = self.cuts.own(tree) if self.cuts else tree
        return self.zero.own(tree) if self.zero else tree


def _act_on_cuts(cuts: Cuts | None, path: Any, act: Act) -> Act:
    """The function of layers that a tensor group divides; `act` itself, if there is none."""
    return act if cuts is None else lambda x: cuts.on_matrices(path, x, act)


def alone(cuts: Cuts | None = None) -> LayerSharing:
    return LayerSharing(lambda path, x, act: _act_on_cuts(cuts, path, act)(x), None, cuts)


def by_host(host: Group, cuts: Cuts | None = None) -> LayerSharing:
    """Sharing of whole arrays that are the same on every device of the group."""
    n = host.size

    @jax.named_scope(LAYERS)
    def on_layers(path: Any, x: jax.Array, act: Act) -> jax.Array:
        layers = _padded(x, n)
        each = layers.shape[0] // n
        mine = jax.lax.dynamic_slice_in_dim(layers, host.index() * each, each)
        acted = host.gather(_act_on_cuts(cuts, path, act)(mine))
        return acted.reshape(-1, *acted.shape[2:])[: x.shape[0]]

    return LayerSharing(on_layers, None, cuts)


def by_parts(zero: Zero, cuts: Cuts | None = None) -> LayerSharing:
    """Sharing of arrays of which each device has its parts, [L, c]."""
    n, group = zero.group.size, zero.group

    @jax.named_scope(LAYERS)
    def on_layers(path: Any, x: jax.Array, act: Act) -> jax.Array:
        L, c = x.shape
        shape = zero.shape(path, L)[1:]
        size = math.prod(shape)
        whole = group.exchange(_padded(x, n), split=0, concat=1)  # [ceil(L / n), n * c]
        acted = _act_on_cuts(cuts, path, act)(whole[:, :size].reshape(-1, *shape)).reshape(-1, size)
        acted = jnp.pad(acted, ((0, 0), (0, n * c - size)))
        return group.exchange(acted, split=1, concat=0)[:L]

    return LayerSharing(on_layers, zero, cuts)


def _padded(x: jax.Array, n: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % n), *[(0, 0)] * (x.ndim - 1)))

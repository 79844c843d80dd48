"""What one device of the grid holds and computes."""

from typing import Any, NamedTuple

import jax

from jaxlm.config import Config, ParallelConfig
from jaxlm.model import Model, Params
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.tensor import ALONE, Tensor
from jaxlm.sync import GradSync, Grid, make_grid, make_sync, sharing
from jaxlm.sync.cuts import Cuts
from jaxlm.sync.zero import Zero

AXIS = "devices"
# Names of the collectives of tensor, context and pipeline groups in a compiled program.
ACTIVATIONS, CONTEXT, STAGES = "share_activations", "share_sequences", "pass_between_stages"
# Names a conditional in a compiled program, before the number of times that a step runs it.
RUNS = "runs_"

# inputs, targets (-1 does not count) and, with packed documents, positions: int32 [B, T]; for an encoder, prompts and
# prompt_positions: int32 [B, S]. With several processes also stop, float32 [1]: 1 if this process was asked to stop.
Batch = dict[str, jax.Array]


class OneDevice(NamedTuple):
    grid: Grid
    model: Model  # its part of the model
    params: Params  # shapes of what it holds of the parameters, without ZeRO
    cuts: Cuts | None  # how the devices of a replica divide them; None = not at all
    sync: GradSync

    def tokens_of(self, batch: Batch) -> Batch:
        """A batch, of which what is added up over tokens is cut to the tokens of this device."""
        added = {name: self.model.context.own(x, 1) for name, x in batch.items() if name in ("targets", "bytes")}
        return batch | added


def one_device(config: Config, model: Model, count: int, platform: str = "") -> OneDevice:
    """Args: model: the whole model; count: devices; platform: that the step is compiled for, "" = JAX's default."""
    grid = make_grid(config.parallel, AXIS, count, platform)
    part = model.having(platform=platform, tensor=tensor_group(grid), context=context_group(grid))
    stage, own = (of_stage(config.parallel, m.shapes()) for m in (model, part))
    cuts = Cuts(grid.group("tensor"), grid.group("pipeline"), stage, own) if grid.splits_model else None
    return OneDevice(grid, part, own, cuts, make_sync(config.parallel, grid.copies, own, cuts))


def of_stage(parallel: ParallelConfig, shapes: Params) -> Params:
    """Shapes of what a pipeline's stage holds of parameters of these shapes: some of the layers. Zeros fill the last
    chunks, if they have fewer.
    """

    def some(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((parallel.chunks * parallel.layers_of_chunk(x.shape[0]), *x.shape[1:]), x.dtype)

    return shapes | {"layers": jax.tree.map(some, shapes["layers"])}


def tensor_group(grid: Grid) -> Tensor:
    """How the devices of a tensor group compute one model together."""
    if grid.size("tensor") == 1:
        return ALONE
    group = grid.group("tensor")

    @jax.named_scope(ACTIVATIONS)
    def gather(x_nD: jax.Array) -> jax.Array:
        return group.gather(x_nD).reshape(-1, *x_nD.shape[1:])

    @jax.named_scope(ACTIVATIONS)
    def scatter(x_ND: jax.Array) -> jax.Array:
        return group.scatter_sum(x_ND.reshape(group.size, -1)).reshape(-1, *x_ND.shape[1:])

    named = jax.named_scope(ACTIVATIONS)
    return Tensor(group.size, group.index, gather, scatter, named(group.sum), named(group.max))


def context_group(grid: Grid) -> Context:
    """How the devices of a context group share sequences."""
    if grid.size("context") == 1:
        return WHOLE
    group = grid.group("context")
    return Context(group.size, group.index, jax.named_scope(CONTEXT)(group.shift))


def sharing_of(config: Config, devices: list[Any], own: OneDevice) -> sharing.LayerSharing:
    """How devices share the optimizer's work on whole layers: with ZeRO those that hold the same, otherwise those of
    them that are on one host. Those of a tensor group exchange their parts.

    All hosts have equally many devices, which are neighbours on the axis.
    """
    copies = own.grid.copies
    if config.parallel.zero:
        return sharing.by_parts(Zero(copies, own.params), own.cuts)
    hosts = [d.process_index for d in devices]
    members = copies.members or (tuple(range(len(devices))),)
    together = [tuple(i for i in m if hosts[i] == host) for m in members for host in dict.fromkeys(hosts[i] for i in m)]
    size = len(together[0])
    if size == 1 or any(len(group) != size for group in together):  # groups of a collective have one size
        return sharing.alone(own.cuts)
    return sharing.by_host(copies._replace(size=size, members=tuple(together) if len(together) > 1 else None), own.cuts)

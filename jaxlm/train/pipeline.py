"""The forward and backward pass of a model whose layers are divided over the stages of a pipeline.

All stages run the same program: a loop over the ticks of a table (schedule_table.py). In each tick a stage runs a chunk
of layers forward for one micro-batch, and one backward for another. The devices exchange within both phases, so stages
without work compute, too, and their result is ignored; before the first backward pass, and after the last forward pass,
there is one phase. What a chunk reads is kept until its backward pass, which computes the chunk again. After each
phase, outputs go to the next stage or gradients to the one before.

All stages hold tables, final norm and output layer. The first one looks tokens up, and the last one computes losses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config
from jaxlm.model import Params
from jaxlm.model.losses import LossSums, output_loss
from jaxlm.sync import overlap
from jaxlm.train import trained
from jaxlm.train.accumulation import micro_batches
from jaxlm.train.one_device import RUNS, STAGES, OneDevice
from jaxlm.train.schedule_table import Run, make_table

State = dict[str, Any]  # of a loop over ticks, see Phases


class Stage:
    """What one device does for a chunk of its layers, inside the mapped step."""

    def __init__(self, config: Config, own: OneDevice, micro: Any, scale: jax.Array | float):
        """Args: micro: (batches, dropout keys), `[micro-batches, ...]`; scale: multiplies the objective."""
        self._config, self._model, self._micro, self._scale = config, own.model, micro, scale
        self.group, self.chunks = own.grid.group("pipeline"), config.parallel.chunks
        self._layers = config.parallel.layers_of_chunk(config.model.num_layers)
        self._is_filled = self._layers * self.chunks * self.group.size > config.model.num_layers
        self.index = self.group.index()

    def is_first(self, chunk: jax.Array) -> jax.Array:
        """Whether this is the first chunk of the model, before which tokens are looked up."""
        return (self.index == 0) & (chunk == 0)

    def is_last(self, chunk: jax.Array) -> jax.Array:
        """Whether this is the last chunk of the model, behind which are the losses."""
        return (self.index == self.group.size - 1) & (chunk == self.chunks - 1)

    def layers_l(self, chunk: jax.Array) -> jax.Array:
        """The numbers of a chunk's layers in the model."""
        return (chunk * self.group.size + self.index) * self._layers + jnp.arange(self._layers)

    def of_chunk(self, tree: Params, chunk: jax.Array) -> Params:
        """A tree of parameters with only this chunk's layers."""
        first, count = chunk * self._layers, self._layers
        return tree | {"layers": jax.tree.map(lambda x: _slice(x, first, count), tree["layers"])}

    def add_of_chunk(self, total: Params, more: Params, chunk: jax.Array, there: jax.Array) -> Params:
        """Adds gradients of a chunk, if they are there, to those of all. Layers that only fill the last chunks
        have none: with parameters of zero they return what they read.
        """
        first, count = chunk * self._layers, self._layers
        more = jax.tree.map(lambda x: jnp.where(there, x.astype(jnp.float32), 0), more)
        exists_l = self.layers_l(chunk) < self._config.model.num_layers

        def add(x: jax.Array, new: jax.Array) -> jax.Array:
            if self._is_filled:
                new = jnp.where(exists_l.reshape(-1, *[1] * (new.ndim - 1)), new, 0)
            return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, first, count) + new, first, 0)

        layers = jax.tree.map(add, total["layers"], more["layers"])
        of_outer = self.is_first(chunk) | self.is_last(chunk)  # all others have none
        outer = jax.lax.cond(
            of_outer, lambda a, b: jax.tree.map(jnp.add, a, b), lambda a, b: a, _outer(total), _outer(more)
        )
        return outer | {"layers": layers}

    def forward(self, params: Params, x_nD: jax.Array, i: jax.Array, chunk: jax.Array) -> jax.Array:
        """Runs a chunk for micro-batch i. `params` has the layers of this chunk; the first one ignores x."""
        batch, keys = self._at(i)
        tokens_BT, positions_BT = batch["inputs"], batch.get("positions")
        x_nD = jax.lax.cond(
            self.is_first(chunk), lambda: self._model.begin(params, tokens_BT, keys, positions_BT), lambda: x_nD
        )
        return self._model.run(params, x_nD, self.layers_l(chunk), tokens_BT.shape, keys, positions_BT)

    def losses(self, params: Params, x_nD: jax.Array, i: jax.Array) -> LossSums:
        """Sums of the losses of micro-batch i, of what the last chunk returned."""
        model, (batch, _) = self._model, self._at(i)
        x_ND, weights = model.end(params, x_nD), model.output_params(params)
        targets_N, vocabulary = batch["targets"].reshape(-1), (model.tensor, model.vocab_size)
        return output_loss(model.unembed, weights, x_ND, targets_N, self._config.loss, self._scale, *vocabulary)

    def nothing(self) -> jax.Array:
        """Zeros of the shape of what goes from stage to stage, `[n, D]`."""
        tokens = self._micro[0]["targets"][0].size // self._model.tensor.size
        return jnp.zeros((tokens, self._config.model.d_model), self._config.model.dtype)

    @jax.named_scope(STAGES)
    def shift(self, x: jax.Array, by: int) -> jax.Array:
        """Sends x to the stage `by` places further on the ring."""
        return self.group.shift(x, by)

    def _at(self, i: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), self._micro)


class Phases:
    """The two phases of a tick, which read and change a state:

    x_nD: what the stage before has sent
    kept: inputs of chunks that wait for their backward pass, `[slots, n, D]`
    g_nD: the gradient of an output, which the next stage has sent
    total: the gradients so far, and the sums of the losses

    `work` is the stage's entry in the table.
    """

    def __init__(self, stage: Stage, params: Params, frozen: Params):
        self._stage, self._params, self._frozen = stage, params, frozen

    def start(self, slots: int) -> State:
        """The state before the first tick, with room for this many inputs."""
        nothing = self._stage.nothing()
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self._params)
        kept = jnp.zeros((slots, *nothing.shape), nothing.dtype)
        return {"x_nD": nothing, "kept": kept, "g_nD": nothing, "total": (zeros, no_losses())}

    def forward(self, state: State, work: Any) -> State:
        """Keeps the input of a chunk, runs the chunk, and sends its output to the next stage."""
        x_nD, slot, chunk = state["x_nD"], jnp.maximum(work.forward_slot, 0), jnp.maximum(work.forward_chunk, 0)
        there_nD = jax.lax.dynamic_index_in_dim(state["kept"], slot, keepdims=False)
        there_nD = jnp.where(work.forward >= 0, x_nD, there_nD)
        kept = jax.lax.dynamic_update_index_in_dim(state["kept"], there_nD, slot, 0)
        some = self._stage.of_chunk(trained.joined(self._frozen, self._params), chunk)
        y_nD = self._stage.forward(some, x_nD, jnp.maximum(work.forward, 0), chunk)
        return state | {"kept": kept, "x_nD": self._stage.shift(y_nD, 1)}

    def backward(self, state: State, work: Any, losses: int) -> State:
        """Runs a chunk again from its kept input, adds its gradients and its losses to the total, and sends the input's
        gradient to the stage before.

        Args: losses: in how many ticks of this loop the last stage computes losses.
        """
        stage, (grads, total) = self._stage, state["total"]
        there, i, chunk = work.backward >= 0, jnp.maximum(work.backward, 0), jnp.maximum(work.backward_chunk, 0)
        x_nD = jax.lax.dynamic_index_in_dim(state["kept"], jnp.maximum(work.backward_slot, 0), keepdims=False)
        if stage.group.on_cpu:
            x_nD = overlap.after(x_nD, state["x_nD"])
        is_last = stage.is_last(chunk)

        def run(some: Params, x_nD: jax.Array) -> tuple[tuple[jax.Array, jax.Array], LossSums]:
            both = trained.joined(stage.of_chunk(self._frozen, chunk) if self._frozen else {}, some)
            y_nD = stage.forward(both, x_nD, i, chunk)
            with jax.named_scope(f"{RUNS}{losses}"):
                sums = jax.lax.cond(is_last, lambda: stage.losses(both, y_nD, i), no_losses)
            return (y_nD, sums.objective), sums

        _, pull_back, sums = jax.vjp(run, stage.of_chunk(self._params, chunk), x_nD, has_aux=True)
        some, dx_nD = pull_back((jnp.where(is_last, 0, state["g_nD"]), jnp.float32(1)))
        total = jax.tree.map(lambda a, b: a + jnp.where(there, b, 0), total, sums)
        return state | {"total": (stage.add_of_chunk(grads, some, chunk, there), total), "g_nD": stage.shift(dx_nD, -1)}


def gradients(
    config: Config, own: OneDevice, params: Params, frozen: Params, micro: Any, scale: jax.Array | float
) -> tuple[Params, LossSums]:
    """Returns the gradient of what this device holds, float32, and the sums of the losses, on all stages the same.

    Args:
      params, frozen: what is trained, and what is not; matrices in the dtype in which they are used.
      micro: (batches, dropout keys), `[micro-batches, ...]`.
      scale: multiplies the objective.
    """
    stage = Stage(config, own, micro, scale)
    count = len(jax.tree.leaves(micro)[0])
    table = make_table(config.parallel.schedule, stage.group.size, count, stage.chunks)
    phases = Phases(stage, params, frozen)
    state = phases.start(table.slots)
    for run in table.runs():

        def tick(state: State, row: Any, run: Run = run) -> tuple[State, None]:
            work = jax.tree.map(lambda column: column[stage.index], row)
            if run.forward:
                state = phases.forward(state, work)
            if run.backward:
                state = phases.backward(state, work, run.ticks.losses(stage.chunks))
            return state, None

        state, _ = jax.lax.scan(tick, state, jax.tree.map(jnp.asarray, run.ticks))
    grads, sums = state["total"]
    return grads, stage.group.sum(sums)


def losses(config: Config, own: OneDevice, params: Params, batch: Any) -> LossSums:
    """The sums of the losses of a batch, on all stages the same. It is cut into micro-batches, if it has the rows."""
    rows = len(batch["inputs"])
    count = max(n for n in range(1, min(rows, 4 * own.grid.size("pipeline")) + 1) if rows % n == 0)
    stage = Stage(config, own, (micro_batches(batch, count), None), 1.0)
    table = make_table(config.parallel.schedule, stage.group.size, count, stage.chunks)

    def tick(carry: tuple[LossSums, jax.Array], row: Any) -> tuple[tuple[LossSums, jax.Array], None]:
        total, x_nD = carry
        i, chunk = row[0][stage.index], jnp.maximum(row[1][stage.index], 0)
        some = stage.of_chunk(params, chunk)
        y_nD = stage.forward(some, x_nD, jnp.maximum(i, 0), chunk)
        counts = stage.is_last(chunk) & (i >= 0)
        sums = jax.lax.cond(counts, lambda: stage.losses(some, y_nD, i), no_losses)
        return (jax.tree.map(jnp.add, total, sums), stage.shift(y_nD, 1)), None

    worked = np.any(table.forward >= 0, axis=1)
    rows_of_table = jnp.asarray(table.forward[worked]), jnp.asarray(table.forward_chunk[worked])
    (total, _), _ = jax.lax.scan(tick, (no_losses(), stage.nothing()), rows_of_table)
    return stage.group.sum(total)


def no_losses() -> LossSums:
    return LossSums(*[jnp.zeros((), jnp.float32)] * len(LossSums._fields))


def _outer(tree: Params) -> Params:
    return {key: x for key, x in tree.items() if key != "layers"}


def _slice(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count) if count < len(x) else x

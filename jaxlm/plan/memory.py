"""The memory of a device, by what it holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import Config, UserError
from jaxlm.model import Model, Params, num_params
from jaxlm.plan.compiled import Compiled
from jaxlm.train import trained
from jaxlm.train.backward import batch_shapes, loss_sums
from jaxlm.train.layout import step_shapes
from jaxlm.train.one_device import Batch, OneDevice, one_device
from jaxlm.train.schedule_table import make_table
from jaxlm.train.step import TrainState, state_axes

GRADIENT = 4.0  # bytes of a number of the gradient, float32


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: float
    optimizer: float
    average: float  # the parameters' moving average
    reduction: float  # state of the reduction of gradients
    batch: float
    kept: float  # what the backward pass needs of the forward pass
    gradients: float
    working: float  # all else that a step holds at its peak
    process: float  # of CPUs: Python, JAX, TensorFlow and compiled programs, which are in the same memory

    @property
    def state(self) -> float:
        """What is there between two steps."""
        return self.parameters + self.optimizer + self.average + self.reduction + self.batch

    @property
    def total(self) -> float:
        return sum(self)


def check_fits(config: Config, model: Model, devices: list[Any]) -> None:
    """Raises UserError if the step cannot fit on the devices. It compiles nothing. CPUs report no limit."""
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in devices if d.process_index == jax.process_index()]
    refuse_over(min(filter(None, limits), default=None), config, model, len(devices))


def refuse_over(limit: float | None, config: Config, model: Model, count: int) -> None:
    """Raises UserError if a step needs more than `limit` bytes on each of `count` devices; None = no limit."""
    least = least_bytes(config, model, count) if limit else 0.0
    if limit and least > limit:
        raise UserError(
            f"batch_size is {config.batch_size}: a step needs at least {least / 1e9:.1f} GB on each of {count} devices;"
            f" allowed: {limit / 1e9:.1f} GB, for instance with more optim.accum_steps, model.remat=full or"
            " parallel.zero=3 (`jaxlm plan` compares them)"
        )


def least_bytes(config: Config, model: Model, count: int) -> float:
    """Bytes that each of `count` devices needs at least: the state, and what is kept for the backward pass or, where
    that is more, the gradients.
    """
    own = one_device(config, model, count)
    held = held_bytes(config, step_shapes(config, model, count), count)
    kept = kept_bytes(config, own, micro_rows(config, count))
    return sum(held.values()) + max(kept, gradient_bytes(config, own))


def plan_memory(config: Config, model: Model, compiled: Compiled, count: int, process: float = 0.0) -> Memory:
    """The memory of each of `count` devices, with the working memory of the compiled program, and the part of the
    process's own memory that goes with a device.
    """
    devices = [one_device(config, model, n) for n in (count, compiled.count)]
    held = held_bytes(config, step_shapes(config, model, count), count)
    kept = kept_bytes(config, devices[0], micro_rows(config, count))
    gradients, compiled_gradients = (gradient_bytes(config, own) for own in devices)
    parts, compiled_parts = (other_parts_bytes(config, own) for own in devices)
    batch = compiled.arguments - sum(held_bytes(config, compiled.state, compiled.count).values())
    working = max(parts, compiled.temporary - kept - compiled_gradients - compiled_parts + parts)
    return Memory(**held, batch=max(batch, 0.0), kept=kept, gradients=gradients, working=working, process=process)


def micro_rows(config: Config, count: int) -> int:
    """Sequences in a micro-batch of each replica of `count` devices."""
    return config.batch_size * config.parallel.of_a_replica // count // config.optim.accum_steps


def gradient_bytes(config: Config, own: OneDevice) -> float:
    """Bytes of the gradient that a device holds; with ZeRO-2 and 3, of its parts."""
    whole = GRADIENT * num_params(trained.part(config, own.params))
    return whole / (own.grid.copies.size if config.parallel.zero > 1 else 1)


def other_parts_bytes(config: Config, own: OneDevice) -> float:
    """Bytes beside the gradient that are fewer on more devices: with ZeRO-2 and 3 the gradient of the next micro-batch,
    if there are several; with ZeRO-3 parameters in the dtype of the computation, to be gathered.
    """
    low = jnp.dtype(config.model.dtype).itemsize
    is_converted = config.parallel.zero == 3 and low < jnp.dtype(config.model.param_dtype).itemsize
    found = low * num_params(own.params) / own.grid.copies.size if is_converted else 0.0
    return found + gradient_bytes(config, own) * (config.parallel.zero > 1 and config.optim.accum_steps > 1)


def held_bytes(config: Config, state: TrainState, count: int) -> dict[str, float]:
    """Bytes that each of `count` devices holds of a state with these shapes."""
    axes = state_axes(config)

    def size(field: str) -> float:
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(getattr(state, field)))
        return total / count if getattr(axes, field) == 0 else total

    names = {"params": "parameters", "opt_state": "optimizer", "ema": "average", "sync": "reduction"}
    return {name: size(field) for field, name in names.items()}


def kept_bytes(config: Config, own: OneDevice, rows: int) -> float:
    """Bytes that a device keeps for the backward pass of micro-batches of `rows` sequences: results that autodiff needs
    and, in a pipeline, also the inputs of chunks that wait for their backward pass.

    The results grow with the number of sequences; what does not grow are the parameters, which are there anyway.
    """
    model = own.model.having(tensor=own.model.tensor.alone(), context=own.model.context.alone())
    params = trained.part(config, own.params)
    frozen, pipeline = trained.without(own.params, params), config.parallel.pipeline
    tokens = config.seq_len // (config.parallel.context * config.parallel.tensor)  # of a sequence, between layers
    waiting, layers = 0, config.parallel.layers_of_chunk(config.model.num_layers)
    if pipeline > 1:
        table = make_table(config.parallel.schedule, pipeline, config.optim.accum_steps, config.parallel.chunks)
        waiting = table.slots * tokens * config.model.d_model * jnp.dtype(config.model.dtype).itemsize

    def objective(params: Params, frozen: Params, batch: Batch, x_nD: jax.Array) -> jax.Array:
        if pipeline == 1:
            batch = batch | {"targets": model.context.own(batch["targets"], 1)}
            return loss_sums(config, model, params, batch, frozen=frozen).objective
        both = trained.joined(frozen, params)
        chunk = both | {"layers": jax.tree.map(lambda x: x[:layers], both["layers"])}
        shape = batch["inputs"].shape
        return model.run(chunk, x_nD, jnp.arange(layers), shape, None, batch.get("positions"))

    def residuals(rows: int) -> float:
        def pull_back(params: Params, frozen: Params, batch: Batch, x_nD: jax.Array) -> Any:
            return jax.vjp(lambda params: objective(params, frozen, batch, x_nD), params)[1]

        x_nD = jax.ShapeDtypeStruct((rows * tokens, config.model.d_model), config.model.dtype)
        kept = jax.eval_shape(pull_back, params, frozen, batch_shapes(config, rows), x_nD)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    return rows * (residuals(2) - residuals(1) + waiting)

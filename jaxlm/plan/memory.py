"""The memory of a device, by what it holds."""

from typing import Any, NamedTuple

import jax

from jaxlm.config import Config, UserError
from jaxlm.model import Model, num_params
from jaxlm.plan.compiled import Compiled
from jaxlm.train import trained
from jaxlm.train.backward import batch_shapes, loss_sums
from jaxlm.train.step import TrainState, init_state, state_axes

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
    state = jax.eval_shape(lambda: init_state(config, model, count))
    kept = kept_bytes(config, model, config.batch_size // count // config.optim.accum_steps)
    return sum(held_bytes(config, state, count).values()) + max(kept, gradient_bytes(config, model, count))


def plan_memory(config: Config, model: Model, compiled: Compiled, count: int, process: float = 0.0) -> Memory:
    """The memory of each of `count` devices, with the working memory of the compiled program, and the part of the
    process's own memory that goes with a device.
    """
    state = jax.eval_shape(lambda: init_state(config, model, count))
    held = held_bytes(config, state, count)
    kept = kept_bytes(config, model, config.batch_size // count // config.optim.accum_steps)
    gradients, compiled_gradients = (gradient_bytes(config, model, n) for n in (count, compiled.count))
    batch = compiled.arguments - sum(held_bytes(config, compiled.state, compiled.count).values())
    working = max(0.0, compiled.temporary - kept - compiled_gradients)
    return Memory(**held, batch=max(batch, 0.0), kept=kept, gradients=gradients, working=working, process=process)


def gradient_bytes(config: Config, model: Model, count: int) -> float:
    """Bytes of the gradient that each of `count` devices holds; with ZeRO-2 and 3, of its parts."""
    params = trained.part(config, jax.eval_shape(model.init, jax.random.key(0)))
    return GRADIENT * num_params(params) / (count if config.parallel.zero > 1 else 1)


def held_bytes(config: Config, state: TrainState, count: int) -> dict[str, float]:
    """Bytes that each of `count` devices holds of a state with these shapes."""
    axes = state_axes(config)

    def size(field: str) -> float:
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(getattr(state, field)))
        return total / count if getattr(axes, field) == 0 else total

    names = {"params": "parameters", "opt_state": "optimizer", "ema": "average", "sync": "reduction"}
    return {name: size(field) for field, name in names.items()}


def kept_bytes(config: Config, model: Model, rows: int) -> float:
    """Bytes of the results that autodiff keeps of `rows` sequences for the backward pass.

    These grow with the number of sequences; what does not grow are the parameters, which are there anyway.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    own = trained.part(config, params)

    def residuals(rows: int) -> float:
        def pull_back(params: Any, frozen: Any, batch: Any) -> Any:
            return jax.vjp(lambda params: loss_sums(config, model, params, batch, frozen=frozen).objective, params)[1]

        kept = jax.eval_shape(pull_back, own, trained.without(params, own), batch_shapes(config, rows))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    return rows * (residuals(2) - residuals(1))

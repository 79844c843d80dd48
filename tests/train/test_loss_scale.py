"""float16 gradients are closer to float32's than bfloat16's are, even of large batches; overflow skips no batch."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.train import loss_scale
from jaxlm.train import step as train_step
from tests.stepping import VOCAB, T, make, make_config, split, start

ROWS = 7680  # 61,440 tokens
# With these keys, the update is the negative gradient.
SGD = [
    "optim.name=sgd",
    "optim.momentum=0",
    "optim.warmup_steps=0",
    "optim.lr=1",
    "optim.clip_norm=0",
    "optim.weight_decay=0",
    "model.use_bias=true",
    "model.position=learned",
    "model.num_layers=1",
    "model.d_model=8",
    "model.key_offset=false",
    "loss.chunk=0",
]


def batch_of(rows: int) -> Any:
    tokens = (VOCAB * np.random.default_rng(0).random((rows, T + 1)) ** 3).astype(np.int32)  # some tokens are rare
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@cache
def gradients(rows: int, devices: int, *overrides: str, damage: bool = False) -> tuple[Any, dict[str, float]]:
    """Returns the gradients of a step, from its update, and its metrics."""
    config = make_config(*SGD, f"batch_size={rows}", *overrides)
    step = train_step.make_train_step(config, make(config), jax.devices()[:devices])
    axes, state = train_step.state_axes(config), start(config, devices)
    if damage:
        state.params["layers"]["mlp"]["up"]["bias"] *= np.nan
    mapped = jax.vmap(step, axis_name=train_step.AXIS, in_axes=(axes, 0), out_axes=(axes, None), axis_size=devices)
    options: Any = {"xla_allow_excess_precision": False}  # otherwise XLA on CPU omits roundings to 16 bits
    after, metrics = jax.jit(mapped, compiler_options=options)(state, split(batch_of(rows), devices))
    grads = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, after.params)
    return grads, {k: float(v) for k, v in metrics.items()}


def errors(*overrides: str, devices: int = 1) -> Any:
    """Returns the relative error of each parameter's gradient against float32."""
    got, _ = gradients(ROWS, devices, *overrides)
    want, _ = gradients(ROWS, 1, *(o for o in overrides if o.startswith("model.tie")))
    norm = np.linalg.norm(np.concatenate([x.ravel() for x in jax.tree.leaves(want)]))
    # The gradient of a key's bias is 0 except for rounding, because softmax is invariant to it.
    return jax.tree.map(lambda a, b: np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-2 * norm), got, want)


@pytest.mark.parametrize("tied", ["false", "true"])
def test_gradients_are_no_worse_than_those_of_bfloat16(tied: str) -> None:
    half, brain = (errors(f"model.tie_embeddings={tied}", f"model.dtype={d}") for d in ("float16", "bfloat16"))
    jax.tree.map(lambda a, b: np.testing.assert_array_less(a, b), half, brain)
    assert max(jax.tree.leaves(half)) < 2.0**-7  # a few dozen roundings of 2^-11


def test_gradients_are_accurate_with_accumulation_overlap_and_a_lossy_reduction() -> None:
    got = errors(
        "model.dtype=float16", "optim.accum_steps=2", "parallel.overlap=true", "parallel.reduce=fp16", devices=2
    )
    assert max(jax.tree.leaves(got)) < 2.0**-7


def test_a_gradient_that_overflows_is_computed_again() -> None:
    """With this weight of the z-loss, the gradients of logits overflow at the first scale."""
    got, metrics = gradients(16, 2, "loss.z_loss=1000", "model.dtype=float16")
    _, wanted = gradients(16, 2, "loss.z_loss=1000")
    assert loss_scale.first_scale(8 * T) * wanted["grad_norm"] > 65504
    assert metrics["skipped"] == 0
    assert metrics["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2.0**-7)
    assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(got))


def test_a_step_that_is_not_finite_is_skipped() -> None:
    grads, metrics = gradients(16, 2, "model.dtype=float16", damage=True)
    assert (metrics["skipped"], metrics["in_row"]) == (1, 1) and not np.isfinite(metrics["loss"])
    assert not any(np.nan_to_num(x).any() for x in jax.tree.leaves(grads))


def test_scales() -> None:
    assert [loss_scale.first_scale(n) for n in (64, 61_440, 10**7)] == [2.0**12, 4, 1]
    found = [float(loss_scale.until_finite(jnp.float32, lambda s, n=n: s <= n, 2.0**8)) for n in (1e9, 100, 0)]
    assert found == [2.0**8, 4, 2.0**-16]

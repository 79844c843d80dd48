"""Compares losses with NumPy, and the chunked output layer with the whole one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import LossConfig
from jaxlm.model.losses import LossSums, cross_entropy, output_loss, read_once, read_twice

N, D, V = 22, 6, 11


def draw(seed: int = 0) -> tuple[Any, Any, Any]:
    """Returns final states, an output matrix, and targets, some of which are -1 for none."""
    rng = np.random.default_rng(seed)
    x_ND, w_DV = rng.standard_normal((N, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32)
    return x_ND, w_DV, np.where(rng.random(N) < 0.6, rng.integers(0, V, N), -1).astype(np.int32)


def reference(logits_NV: np.ndarray, targets_N: np.ndarray, c: LossConfig) -> list[float]:
    """Returns the sums, computed token by token from probabilities."""
    objective = nll = correct = count = 0.0
    for logits, target in zip(logits_NV.astype(np.float64), targets_N, strict=True):
        if target == -1:
            continue
        z = np.exp(logits).sum()
        wanted = np.full(V, c.label_smoothing / V)
        wanted[target] += 1 - c.label_smoothing
        objective += -(wanted * np.log(np.exp(logits) / z)).sum() + c.z_loss * np.log(z) ** 2
        nll -= np.log(np.exp(logits[target]) / z)
        correct += logits.argmax() == target
        count += 1
    return [objective, nll, correct, count]


def product(w_DV: Any, x_ND: Any) -> jax.Array:
    return x_ND @ w_DV


SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.05)]


@pytest.mark.parametrize("smoothing, z_loss", SETTINGS)
def test_cross_entropy_equals_the_reference(smoothing: float, z_loss: float) -> None:
    c = LossConfig(label_smoothing=smoothing, z_loss=z_loss, chunk=0)
    x_ND, w_DV, targets_N = draw()
    logits_NV = 2 * x_ND @ w_DV
    targets_N[:6] = logits_NV[:6].argmax(-1)  # some predictions are right
    assert (targets_N == -1).any()
    sums, _ = cross_entropy(jnp.asarray(logits_NV), jnp.asarray(targets_N), c)
    assert all(s.shape == () and s.dtype == jnp.float32 for s in sums)
    np.testing.assert_allclose(np.array(sums), reference(logits_NV, targets_N, c), rtol=2e-6)
    assert 0 < sums.correct < sums.targets
    assert (sums.objective == sums.nll) == (smoothing == z_loss == 0)


def test_large_logits_do_not_overflow() -> None:
    c = LossConfig(label_smoothing=0.0, z_loss=0.0, chunk=0)
    logits_NV = jnp.array([[1e4, 0.0, -1e4], [-1e30, 5.0, 5.0]])
    sums, grad_NV = cross_entropy(logits_NV, jnp.array([1, 2]), c)
    np.testing.assert_allclose(sums.nll, 1e4 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad_NV, [[1, -1, 0], [0, 0.5, -0.5]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing, z_loss", SETTINGS)
def test_the_gradient_is_that_of_autodiff(smoothing: float, z_loss: float) -> None:
    """Through a soft cap, and scaled; autodiff goes through the formula of the loss."""
    c = LossConfig(label_smoothing=smoothing, z_loss=z_loss, chunk=4)
    x_ND, w_DV, targets_N = draw(2)

    def capped(w_DV: Any, x_ND: Any) -> jax.Array:
        return 3 * jnp.tanh(x_ND @ w_DV / 3)

    def formula(w_DV: Any, x_ND: Any) -> jax.Array:
        log_p_NV = jax.nn.log_softmax(capped(w_DV, x_ND))
        wanted_NV = (1 - smoothing) * jax.nn.one_hot(targets_N, V) + smoothing / V
        log_z_N = jax.nn.logsumexp(capped(w_DV, x_ND), axis=-1)
        loss_N = -(wanted_NV * log_p_NV).sum(-1) + z_loss * log_z_N**2
        return 0.5 * jnp.sum(jnp.where(targets_N >= 0, loss_N, 0))

    def fused(w_DV: Any, x_ND: Any) -> jax.Array:
        return output_loss(capped, w_DV, x_ND, targets_N, c, scale=0.5).objective

    want, want_grads = jax.value_and_grad(formula, argnums=(0, 1))(w_DV, x_ND)
    got, got_grads = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(w_DV, x_ND)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6), got_grads, want_grads)
    twice = jax.grad(lambda w: 2 * fused(w, x_ND))(w_DV)  # what comes after the loss multiplies its gradient
    np.testing.assert_allclose(twice, 2 * got_grads[0], rtol=1e-6)


def test_the_backward_pass_computes_no_logits_again() -> None:
    """Three products: logits and the gradients of states and weights. Without a gradient, only the logits."""
    x_ND, w_DV, targets_N = draw()

    def products(f: Any) -> int:
        return str(jax.make_jaxpr(f)(w_DV, x_ND)).count("dot_general")

    c = LossConfig(label_smoothing=0.0, z_loss=0.0, chunk=8)

    def loss(w_DV: Any, x_ND: Any) -> jax.Array:
        return output_loss(product, w_DV, x_ND, targets_N, c).objective

    assert products(jax.grad(loss, argnums=(0, 1))) == 3
    assert products(loss) == 1


def test_both_ways_to_read_logits_agree() -> None:
    """GPUs read them once, CPUs twice; rows that rise, fall, are large, or have a number that is not finite."""
    rows = [np.arange(50.0), -np.arange(50.0), 1e4 * np.sin(np.arange(50.0)), np.full(50, -3e38)]
    logits_NV = jnp.asarray(np.stack(rows), jnp.float32)
    for once, twice in zip(read_once(logits_NV), read_twice(logits_NV), strict=True):
        np.testing.assert_allclose(once, twice, rtol=1e-6)
    for bad in (jnp.nan, jnp.inf):
        for read in (read_once, read_twice):
            assert not np.isfinite(read(logits_NV.at[0, 7].set(bad))[1][0])


def test_tokens_without_a_target_have_no_gradient() -> None:
    c = LossConfig(label_smoothing=0.1, z_loss=0.1, chunk=0)
    x_ND, w_DV, targets_N = draw()
    grad = cross_entropy(jnp.asarray(x_ND @ w_DV), targets_N, c)[1]
    np.testing.assert_array_equal(np.abs(grad).max(-1) > 0, targets_N >= 0)
    assert 0 < (targets_N >= 0).sum() < N


@pytest.mark.parametrize("smoothing, z_loss", SETTINGS[::3])
def test_the_output_loss_does_not_depend_on_chunks(smoothing: float, z_loss: float) -> None:
    """Values and gradients are equal, whether chunks divide the 22 tokens or not, have 1 token or more than 22."""
    x_ND, w_DV, targets_N = draw(1)

    def compute(chunk: int) -> tuple[LossSums, Any, int]:
        c = LossConfig(label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)

        def loss(x_ND: Any, w_DV: Any) -> tuple[jax.Array, LossSums]:
            sums = output_loss(product, w_DV, x_ND, targets_N, c)
            return sums.objective, sums

        both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).trace(x_ND, w_DV)
        grads, sums = both.lower().compile()(x_ND, w_DV)
        return sums, grads, f"f32[{N},{V}]" in str(both.jaxpr)

    sums, grads, whole = compute(0)
    assert whole
    c = LossConfig(label_smoothing=smoothing, z_loss=z_loss, chunk=0)
    np.testing.assert_allclose(np.array(sums), reference(x_ND @ w_DV, targets_N, c), rtol=2e-6)
    for chunk in (11, 5, 1, 50):
        other_sums, other_grads, other_whole = compute(chunk)
        assert other_whole == (chunk > N)  # with chunks, the logits of all tokens never exist at once
        np.testing.assert_allclose(np.array(other_sums), np.array(sums), rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), other_grads, grads)

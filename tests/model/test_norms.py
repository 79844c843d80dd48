"""Compares norms and their gradients with NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.norms import normalize, sum_once, sum_twice

R, C = 5, 24
ROUNDED = {"xla_allow_excess_precision": False}  # otherwise XLA omits roundings to bfloat16 on CPU


def draw() -> tuple[np.ndarray, ...]:
    """Rows, of which the mean is three standard deviations, scale, bias, and a gradient of the result."""
    rng = np.random.default_rng(0)
    x_RC, g_RC = 3 + rng.standard_normal((R, C)), rng.standard_normal((R, C))
    return x_RC, 1 + 0.5 * rng.standard_normal(C), rng.standard_normal(C), g_RC


def reference(center: bool, eps: float, x_RC: Any, scale_C: Any, bias_C: Any) -> np.ndarray:
    rows = [np.asarray(row) - (np.mean(row) if center else 0) for row in x_RC]
    return np.stack([row / np.sqrt(np.mean(row**2) + eps) for row in rows]) * scale_C + bias_C


def reference_gradients(arguments: tuple[np.ndarray, ...], g_RC: np.ndarray, center: bool, eps: float) -> list:
    """Central differences in float64, exact to about 1e-9."""
    gradients = []
    for i, argument in enumerate(arguments):
        gradient = np.zeros_like(argument)
        for at in np.ndindex(argument.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = argument.copy()
                moved[at] += step
                others = [moved if j == i else a for j, a in enumerate(arguments)]
                values.append((reference(center, eps, *others) * g_RC).sum())
            gradient[at] = (values[0] - values[1]) / 2e-5
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype, unit", [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)])
def test_values_and_gradients_equal_the_reference(center: bool, dtype: Any, unit: float) -> None:
    x_RC, scale_C, bias_C, g_RC = draw()
    x, g = jnp.asarray(x_RC, dtype), jnp.asarray(g_RC, dtype)
    exact = np.asarray(x, np.float64), scale_C, bias_C
    arguments = x, jnp.asarray(scale_C, jnp.float32), jnp.asarray(bias_C, jnp.float32)

    def both(x: Any, scale: Any, bias: Any) -> Any:
        y, pull_back = jax.vjp(lambda x, scale, bias: normalize(x, scale, bias, center, 1e-5), x, scale, bias)
        return y, pull_back(g)

    y, gradients = jax.jit(both, compiler_options=ROUNDED)(*arguments)
    assert y.dtype == gradients[0].dtype == dtype and gradients[1].dtype == gradients[2].dtype == jnp.float32
    # Results of up to 8 have a few roundings in float32, of 5e-7 each, and one to the dtype.
    np.testing.assert_allclose(y, reference(center, 1e-5, *exact), rtol=unit, atol=3e-6)
    want = reference_gradients(exact, np.asarray(g, np.float64), center, 1e-5)
    for got, wanted, rounding in zip(gradients, want, (unit, 0, 0), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=rounding, atol=5e-6)


def test_a_constant_row_gives_the_bias() -> None:
    """In 16 bits the variance is a difference, which must not become negative."""
    x_RC = jnp.full((1, C), 7.3, jnp.bfloat16)
    y_RC = normalize(x_RC, jnp.ones(C), jnp.full(C, 0.5), True, 1e-5)
    np.testing.assert_allclose(y_RC, np.full((1, C), 0.5), rtol=0, atol=0.01)


def test_two_ways_to_sum_along_columns_agree() -> None:
    """GPUs add up both arrays in one reduction, CPUs in two."""
    a_RC, b_RC = (jnp.asarray(np.random.default_rng(i).integers(-99, 99, (300, C)), jnp.float32) for i in range(2))
    for once, twice, whole in zip(sum_once(a_RC, b_RC), sum_twice(a_RC, b_RC), (a_RC, b_RC), strict=True):
        np.testing.assert_array_equal(once, twice)
        np.testing.assert_array_equal(once, np.asarray(whole).sum(axis=0))

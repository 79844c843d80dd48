"""Compares attention with NumPy, and rows that hold several documents with each document alone."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import files
from jaxlm.model import make_model
from jaxlm.model.attention import Scores, choose_kernel, in_chunks, self_attention, triton
from jaxlm.model.remat import REMAT
from jaxlm.model.rope import rope_tables, rotate
from tests import reference

PLAIN = Scores(8**-0.5)  # for heads of size 8
BASE = files.load(Path(__file__).resolve().parents[2] / "configs" / "base.py")


def attention(q: Any, k: Any, v: Any, segments: Any = None) -> jax.Array:
    return self_attention(q, k, v, PLAIN, segments)


@pytest.mark.parametrize("T, kv_heads", [(1, 2), (63, 2), (128, 4), (130, 2), (256, 1), (257, 2), (260, 2)])
def test_attention_equals_the_reference_at_any_length(T: int, kv_heads: int) -> None:
    rng = np.random.default_rng(T)
    q_BTHC = rng.standard_normal((2, T, 4, 8)).astype(np.float32)
    k_BTKC, v_BTKC = rng.standard_normal((2, 2, T, kv_heads, 8)).astype(np.float32)
    out = jax.jit(attention)(q_BTHC, k_BTKC, v_BTKC)
    assert out.shape == q_BTHC.shape
    for b, h in itertools.product(range(2), range(4)):
        k = h * kv_heads // 4
        expected = reference.attention(
            *(x.astype(np.float64) for x in (q_BTHC[b, :, h], k_BTKC[b, :, k], v_BTKC[b, :, k]))
        )
        np.testing.assert_allclose(out[b, :, h], expected, rtol=0, atol=3e-6)


def test_attention_is_cut_into_chunks_of_queries() -> None:
    def products(T: int) -> int:
        q_BTHC = jnp.zeros((1, T, 2, 4))
        return str(jax.make_jaxpr(attention)(q_BTHC, q_BTHC, q_BTHC)).count("dot_general")

    assert [products(T) for T in (64, 127, 128, 129, 256)] == [2, 2, 4, 2, 8]  # two products a chunk
    assert products(32_768) == 2 * 16  # of at most 2048 queries, because memory for scores grows with them


def test_large_scores_do_not_overflow() -> None:
    """With scores of a few thousand, exp overflows in float32 unless the largest score is subtracted."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 40, 2, 8)).astype(np.float32)
    q *= 1000
    out, grads = jax.jit(jax.value_and_grad(lambda q: attention(q, k, v).sum()))(q)
    expected = sum(reference.attention(*(x[0, :, h].astype(np.float64) for x in (q, k, v))).sum() for h in range(2))
    np.testing.assert_allclose(out, expected, rtol=1e-3)  # scores are exact to 1e-4
    assert np.isfinite(grads).all()


ROUNDED = {"xla_allow_excess_precision": False}  # otherwise XLA omits roundings to bfloat16 on CPU
HALF = 2.0**-8  # largest relative error of a rounding to bfloat16


def test_bfloat16_attention_has_scores_and_softmax_in_float32() -> None:
    """With scores of up to 100, rounding them to bfloat16 would change the weights by a fifth."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((3, 1, 60, 2, 8)))
    q *= 16
    out = jax.jit(attention, compiler_options=ROUNDED)(q, k, v)
    for h in range(2):
        expected = reference.attention(*(np.asarray(x[0, :, h], np.float64) for x in (q, k, v)))
        # The weights and the result are rounded once each.
        np.testing.assert_allclose(
            np.asarray(out[0, :, h], np.float64), expected, rtol=0, atol=2 * HALF * np.abs(v).max()
        )


def test_rotation_is_computed_in_float32() -> None:
    rng = np.random.default_rng(0)
    x_BTHC = jnp.asarray(rng.standard_normal((1, 50, 2, 8)), jnp.bfloat16)
    c = dataclasses.replace(BASE.model, head_dim=8, rope_theta=100.0)
    tables = rope_tables(jnp.arange(1000, 1050), c)
    out = jax.jit(lambda x: rotate(x, rope_tables(jnp.arange(1000, 1050), c)), compiler_options=ROUNDED)(x_BTHC)
    assert out.dtype == jnp.bfloat16 and {t.dtype for t in tables} == {jnp.dtype("float32")}
    whole = np.concatenate([np.zeros((1000, 8)), np.asarray(x_BTHC[0, :, 1], np.float64)])
    expected = reference.rotate(whole, 100.0)[1000:]
    # Atol for the rounding of the angle.
    np.testing.assert_allclose(np.asarray(out[0, :, 1], np.float64), expected, rtol=1.01 * HALF, atol=2e-4)


def test_attention_stays_inside_a_segment() -> None:
    """Queries attend only within their segment, also if it extends over several chunks of 64 queries."""
    T, lengths = 256, [10, 54, 1, 100, 91]
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, T, 2, 8)).astype(np.float32)
    other = np.repeat([7, 7, 8], [20, 70, 166])  # the other row has other segments; only equality of numbers matters
    segments_BT = np.stack([np.repeat(np.arange(5), lengths), other])
    out = np.asarray(jax.jit(attention)(q, k, v, segments_BT))
    for b, cuts in enumerate([np.cumsum(lengths)[:-1], [90]]):
        for span, h in itertools.product(np.split(np.arange(T), cuts), range(2)):
            expected = reference.attention(*(x[b, span, h].astype(np.float64) for x in (q, k, v)))
            np.testing.assert_allclose(out[b, span, h], expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_documents_in_one_row_do_not_affect_each_other(position: Any) -> None:
    """The states of a packed row, and gradients through them, equal those of the documents one by one."""
    T, V, lengths = 24, 13, [5, 1, 11, 7]
    c = dataclasses.replace(BASE.model, num_layers=2, d_model=16, num_heads=2, position=position, rope_theta=100.0,
                            scan_unroll=1, residual_init="scaled", attention="xla")  # fmt: skip
    model = make_model(c, V, T)
    rng = np.random.default_rng(0)
    shapes = model.shapes()
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    tokens, direction_TD = rng.integers(0, V, T).astype(np.int32), rng.standard_normal((T, 16)).astype(np.float32)
    documents = np.split(np.arange(T), np.cumsum(lengths)[:-1])
    positions_BT = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]

    def together(params: Any) -> tuple[jax.Array, jax.Array]:
        x_TD = model.hidden(params, tokens[None], positions_BT=positions_BT)
        return jnp.sum(x_TD * direction_TD), x_TD

    def alone(params: Any) -> tuple[jax.Array, jax.Array]:
        x_TD = jnp.concatenate([model.hidden(params, tokens[None, span]) for span in documents])
        return jnp.sum(x_TD * direction_TD), x_TD

    (got, got_x), (want, want_x) = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (together, alone))
    np.testing.assert_allclose(got_x, want_x, rtol=0, atol=1e-5)  # states of order 1; hundreds of roundings of 6e-8
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), got, want)
    whole_row = model.hidden(params, tokens[None])
    assert np.abs(whole_row[:5] - want_x[:5]).max() < 1e-5 < 0.1 < np.abs(whole_row[5:] - want_x[5:]).max()


def test_the_triton_kernel_equals_plain_attention() -> None:
    """With segments, grouped heads and a length that is padded: values and gradients, by the kernel's interpreter."""
    T, kv_heads = 130, 2
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, T, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, T, kv_heads, 8)).astype(np.float32)
    segments_BT = np.sort(rng.integers(0, 5, (2, T)), axis=1).astype(np.int32)
    direction = rng.standard_normal(q.shape).astype(np.float32)

    def both(attention: Any) -> Any:
        def along(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
            out = attention(q, k, v, segments_BT=segments_BT)
            return jnp.sum(out * direction), out

        return jax.jit(jax.grad(along, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    got, want = both(partial(triton, scores=PLAIN, interpret=True)), both(partial(in_chunks, scores=PLAIN))
    # Sums of up to 130 products of order 1, each rounded to 6e-8.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)
    assert np.abs(attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)) - want[1]).max() > 0.1


def test_elementwise_remat_keeps_what_the_triton_kernel_returns() -> None:
    """One forward kernel: the backward pass does not run it again, as it does if only inputs are kept."""
    q = jnp.ones((1, 128, 2, 8))

    def forwards(policy: Any) -> int:
        def loss(q: jax.Array) -> jax.Array:
            return triton(2 * q, q, q, PLAIN, jnp.zeros((1, 128), jnp.int32), interpret=True).sum()

        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(q)).count("name=mha_forward")

    assert (forwards(REMAT["elementwise"]), forwards(None)) == (1, 2)


@pytest.mark.parametrize(
    "platform, wanted, dtype, head, packed, kernel",
    [
        ("gpu", "auto", "bfloat16", 64, False, "cudnn"),
        ("gpu", "auto", "bfloat16", 64, True, "triton"),
        ("gpu", "auto", "float16", 128, False, "cudnn"),
        ("gpu", "auto", "float32", 64, False, "xla"),
        ("gpu", "auto", "bfloat16", 136, True, "xla"),
        ("gpu", "auto", "bfloat16", 60, False, "xla"),
        ("cpu", "auto", "bfloat16", 64, True, "xla"),
        ("gpu", "xla", "bfloat16", 64, False, "xla"),
        ("gpu", "cudnn", "bfloat16", 64, True, "cudnn"),  # as asked for
    ],
)
def test_the_attention_kernel_fits_platform_dtype_and_head_size(
    platform: str, wanted: Any, dtype: Any, head: int, packed: bool, kernel: str
) -> None:
    c = dataclasses.replace(BASE.model, attention=wanted, dtype=dtype, d_model=2 * head, num_heads=2)
    assert choose_kernel(c, platform, packed) == kernel

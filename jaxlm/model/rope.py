"""Rotary positions (Su et al., RoFormer), and their stretching for texts longer than those of the first training.

Shapes: R rotated channels of a head, of which a pair (i, i + R / 2) turns by one angle, as in Llama's Hugging Face
weights; otherwise those of attention.py.
"""

import math
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig

Tables = tuple[jax.Array, jax.Array]  # cosines and signed sines, float32 [..., 1, R]
# llama3 leaves wavelengths alone that fit four times in the old context, and stretches all that do not fit once.
LLAMA3_HIGH, LLAMA3_LOW = 4.0, 1.0


def rope_tables(positions: jax.Array, c: ModelConfig) -> Tables:
    """Tables for `rotate`, of layers that attend to all tokens."""
    frequencies = c.rope_theta ** (-np.arange(0, c.rotated, 2) / c.rotated)
    match c.rope_scaling:
        case "none":
            return _tables(positions, frequencies)
        case "linear":  # Chen et al., Extending Context Window of Large Language Models via Positional Interpolation
            return _tables(positions, frequencies / c.rope_factor)
        case "llama3":
            return _tables(positions, _llama3(frequencies, c))
        case "longrope":  # Ding et al., LongRoPE; in long texts, other numbers than in short ones
            short, long = (frequencies / np.array(t.split(), float) for t in (c.rope_short, c.rope_long))
            is_long = jnp.max(positions) >= c.rope_original
            growth = math.sqrt(1 + math.log(c.rope_factor) / math.log(c.rope_original)) if c.rope_factor > 1 else 1.0
            cos, sin = _tables(positions, jnp.where(is_long, jnp.float32(long), jnp.float32(short)))
            return cos * growth, sin * growth
        case other:
            assert_never(other)


def local_rope_tables(positions: jax.Array, c: ModelConfig) -> Tables:
    """Tables of layers with a window, where they have a base of their own."""
    return _tables(positions, c.rope_local_theta ** (-np.arange(0, c.rotated, 2) / c.rotated))


def _llama3(frequencies: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Long wavelengths grow by the factor, short ones not, and those between by a weighted mean (Dubey et al., The
    Llama 3 Herd of Models; the formula is that of the released code).
    """
    fits = c.rope_original * frequencies / (2 * math.pi)  # how often a wavelength fits in the old context
    weight = np.clip((fits - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    return frequencies * (weight + (1 - weight) / c.rope_factor)


def _tables(positions: jax.Array, frequencies: np.ndarray | jax.Array) -> Tables:
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTHC: jax.Array, rope: Tables) -> jax.Array:
    """Rotates the first R channels of each head.

    The halves are swapped by a roll: on CPU, concatenating them would take a tenth of a small model's step.
    """
    cos, sin = rope
    R = cos.shape[-1]
    x = x_BTHC[..., :R].astype(jnp.float32)
    turned = (x * cos + jnp.roll(x, R // 2, axis=-1) * sin).astype(x_BTHC.dtype)
    return turned if x_BTHC.shape[-1] == R else jnp.concatenate([turned, x_BTHC[..., R:]], axis=-1)

"""Packing arrays into a matrix with a row for each device, or into buckets, keeps every element exactly once."""

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.sync.buckets import piece_shapes, plan
from jaxlm.sync.packed import join, pack, part_shape, split, unpack, unpack_parts

shapes_st = st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(shapes_st, st.integers(1, 400))
def test_buckets_hold_everything_once_within_the_limit(shapes: list[tuple[int, ...]], limit: int):
    buckets = plan(shapes, limit)
    seen = [[np.zeros(s[0], int)] for s in shapes]
    for bucket in buckets:
        assert bucket
        sizes = [4 * math.prod(s) for s in piece_shapes(bucket, shapes)]
        one_tensor = len(bucket) == 1 and bucket[0].layers.stop - bucket[0].layers.start == 1
        assert sum(sizes) <= limit or one_tensor
        for piece in bucket:
            seen[piece.array][0][piece.layers] += 1
    assert all((s[0] == 1).all() for s in seen)
    assert len(plan(shapes, None)) == 1


@settings(deadline=None, max_examples=12)
@given(shapes_st, st.integers(1, 9), st.sampled_from([1, 4, 16]))
def test_unpacking_restores_packed_arrays(shapes: list[tuple[int, ...]], n: int, block: int):
    arrays = [jnp.asarray(np.random.default_rng(i).normal(size=s)) for i, s in enumerate(shapes)]
    packed = pack(arrays, n, block)
    assert packed.shape[0] == n and packed.shape[1] % block == 0
    for got, x in zip(unpack(packed, shapes), arrays, strict=True):
        np.testing.assert_array_equal(got, x)
    for device in range(n):
        for part, x in zip(unpack_parts(packed[device], shapes, n), arrays, strict=True):
            assert part.shape == part_shape(x.shape, n)
            np.testing.assert_array_equal(part, split(x, n)[device])
    assert all(np.array_equal(join(split(x, n), x.shape), x) for x in arrays)

"""Steps of a model with an encoder: divided over devices in any way, they compute what one device computes."""

import jax
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.plan.compiled import compile_step
from tests.grids import PAIRS, RTOL, VOCAB, T, assert_same, check_comes_back, gap, make_config, train

S = 12
ENCODER = (
    "model.encoder_layers=3",
    "model.residual_init=scaled",  # the encoder has no gradient at first if the attention to it adds nothing
    f"model.encoder_len={S}",
    *PAIRS,
    "data.tokenizer=bytes",
)
# One number of devices for all, because each compiles.
WAYS = {
    "zero=2, micro-batches": ("optim.name=adafactor", "parallel.zero=2", "optim.accum_steps=3"),
    "tensor, zero=3, dropout": ("optim.name=sgd", "parallel.tensor=2", "parallel.zero=3", "model.dropout=0.2"),
}
MORE_WAYS = {
    "zero=3": ("optim.name=adamw", "parallel.zero=3", "log.layer_stats=true"),
    "data": ("optim.name=muon",),
    "zero=1": ("optim.name=muon", "parallel.zero=1"),
    "zero=3, ring": (
        "optim.name=lion",
        "parallel.zero=3",
        "parallel.reduce=ring",
        "optim.accum_steps=3",
    ),
    "overlap": ("optim.name=adamw", "parallel.overlap=true", "model.scan_unroll=0"),
    "tensor": ("optim.name=muon", "parallel.tensor=2", "model.num_kv_heads=1"),
    "frozen encoder, zero=3": ("optim.name=adamw", "parallel.zero=3", "optim.freeze=^encoder/"),
    "lora": ("optim.name=adamw", "parallel.zero=3", "model.lora_rank=2", "model.lora_dropout=0.2"),
}


@pytest.mark.parametrize("name", [*WAYS, *(pytest.param(name, marks=pytest.mark.grids) for name in MORE_WAYS)])
def test_devices_compute_what_one_computes(name: str):
    way = ENCODER + (WAYS | MORE_WAYS)[name]
    alone = [key for key in way if not key.startswith(("parallel", "optim.accum_steps"))]
    got, want = train(4, *way), train(1, *alone, "model.remat=elementwise" if "zero=3" in name else "model.remat=none")
    assert_same(got, want)
    assert not np.allclose(want.metrics[0], want.metrics[-1], rtol=1e-3)
    for key, x in want.stats.items():
        np.testing.assert_allclose(got.stats[key], x, rtol=10 * RTOL)
    check_comes_back(got)


def test_every_parameter_learns():
    """Also those of the encoder, whose gradient comes through the decoder's attention to it."""
    result = train(1, *ENCODER, "optim.name=adamw", "optim.weight_decay=0", "model.remat=elementwise")
    initial = result.placement.saved(result.placement.initial())
    assert initial is not None
    for (path, x), before in zip(
        jax.tree_util.tree_leaves_with_path(result.params), jax.tree.leaves(initial.params), strict=True
    ):
        still = np.abs(x - before).max(axis=tuple(range(1, x.ndim))) == 0  # by layer, or by row
        assert not still.any(), path


@pytest.mark.grids
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_gathered_matrices_compute_the_same(dtype: str):
    keys = (*ENCODER, "optim.name=adamw", f"model.dtype={dtype}", "model.remat=elementwise")
    got, want = (train(2, *keys, f"parallel.zero={zero}", steps_done=2) for zero in (3, 1))
    np.testing.assert_allclose(got.metrics, want.metrics, rtol=RTOL)
    assert gap(got.params, want.params) < 10 * RTOL


def test_the_compiler_gives_a_device_its_part_of_the_memory():
    """ZeRO-3: each of 8 devices holds 1/8 between steps, and some whole layers, of decoder or encoder, in a step."""
    keys = [
        *ENCODER,
        "optim.name=adamw",
        "model.num_layers=8",
        "model.encoder_layers=8",
        "model.d_model=64",
        "batch_size=8",
    ]
    found = {z: compile_step(make_config(*keys, f"parallel.zero={z}"), jax.devices()[:8], VOCAB) for z in (0, 3)}
    params = sum(4 * x.size for x in jax.tree.leaves(found[0].params))
    layer = sum(4 * x.size // 8 for x in jax.tree.leaves(found[0].params["layers"]))
    assert found[3].arguments == pytest.approx(found[0].arguments / 8, rel=0.01)
    assert found[3].temporary < 3 / 8 * params + 4 * layer < found[0].temporary


@pytest.mark.parametrize(
    "changes, named",
    [
        (["parallel.pipeline=2"], "model.encoder_layers"),
        (["parallel.context=2"], "parallel.context"),
        (["parallel.tensor=8", "model.num_heads=8", "model.d_model=64"], "model.encoder_len"),
        (["data.packing=concat"], "data.packing"),
        (["model.encoder_len=0"], "model.encoder_len"),
        (["model.window=4"], "model.window"),
        (["data.source=stdlib", "data.prompt_key=", "data.response_key="], "data.source"),
        (["data.prompt_key="], "data.prompt_key"),
        (["data.messages_key=m"], "data.messages_key"),
        (["data.mixture=1 functions; 1 stdlib"], "data.mixture"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(changes: list[str], named: str):
    with pytest.raises(
        UserError,
        match=f"^{named} is .*; allowed: (.*encoder_layers|a multiple of parallel.tensor|with parallel.pipeline)",
    ):
        make_config(*ENCODER, *changes)
    assert T == 8

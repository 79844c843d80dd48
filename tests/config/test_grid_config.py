"""Grids that a configuration does not admit, and devices that do not divide into replicas, are refused in one line."""

import pytest

from jaxlm.config import UserError
from jaxlm.config.files import BASE, load
from jaxlm.host import runtime

SIZES = ["model.num_layers=4", "model.num_heads=4", "model.d_model=64", "model.d_ff=96", "seq_len=64", "batch_size=16"]
LONG = ["model.rope_scaling=longrope", "model.rope_original=9", "model.rope_factor=2"]
NUMBERS = " ".join(["1"] * 8)

REFUSED = [
    (["tensor=0"], "parallel.tensor is 0; allowed: more than 0"),
    (["tensor=8"], "model.num_heads is 4; allowed: a multiple of parallel.tensor = 8"),
    (["tensor=4", "model.d_ff=98"], "model.d_ff is 98; allowed: a multiple of parallel.tensor = 4"),
    (
        ["tensor=2", "model.num_heads=6", "model.head_dim=16", "model.num_kv_heads=3"],
        "model.num_kv_heads is 3; allowed: a multiple or a divisor of parallel.tensor = 2",
    ),
    (["context=3"], "seq_len is 64; allowed: a multiple of 2 * parallel.context = 6"),
    (["context=2", "tensor=4", "seq_len=68"], "seq_len is 68; allowed: a multiple of parallel.context * parallel.te"),
    (["context=2", *LONG], "model.rope_scaling is 'longrope'; allowed: with parallel.context, which does not know"),
    (
        ["context=2", "model.attention=cudnn", "model.dtype=bfloat16"],
        "model.attention is 'cudnn'; allowed: with parallel.context, whose attention is its own: auto, xla",
    ),
    (["pipeline=5"], "model.num_layers is 4; allowed: with parallel.pipeline=5 and parallel.chunks=1, at least 5"),
    (
        ["pipeline=2", "chunks=3"],
        "model.num_layers is 4; allowed: with parallel.pipeline=2 and parallel.chunks=3, at l",
    ),
    (["chunks=2"], "parallel.chunks is 2; allowed: with parallel.pipeline=1, 1"),
    (["pipeline=2", "zero=2"], "parallel.zero is 2; allowed: with parallel.pipeline, whose stages add up whole grad"),
    (["pipeline=2", "overlap=true"], "parallel.overlap is True; allowed: with parallel.pipeline"),
    (["pipeline=2", "model.dtype=float16"], "model.dtype is 'float16'; allowed: with parallel.pipeline, float32 or b"),
    (["pipeline=2", "log.layer_stats=true"], "log.layer_stats is True; allowed: with parallel.pipeline, false"),
]


def overrides(keys: list[str]) -> list[str]:
    named = [key if "." in key.split("=")[0] or key.startswith("seq_len") else f"parallel.{key}" for key in keys]
    rope = [f"model.rope_{length}={NUMBERS}" for length in ("short", "long")]
    return [f"--config.{key}" for key in (*SIZES, *rope, *named)]


@pytest.mark.parametrize("keys, words", REFUSED, ids=["-".join(keys) for keys, _ in REFUSED])
def test_what_does_not_divide_is_refused(keys: list[str], words: str):
    with pytest.raises(UserError) as error:
        load(BASE, overrides(keys))
    assert words in str(error.value)


def test_devices_that_replicas_do_not_divide_are_refused():
    config = load(BASE, overrides(["tensor=2", "pipeline=2", "optim.accum_steps=2"]))
    runtime.check_batch(config, 0, 1)  # the number of devices is not known yet
    runtime.check_batch(config, 8, 1)
    with pytest.raises(UserError, match=r"parallel.pipeline \* parallel.tensor is 2 \* 2; allowed: a divisor of 6 dev"):
        runtime.check_batch(config, 3, 2)
    with pytest.raises(UserError, match=r"batch_size is 16; allowed: a multiple of 6 = 12 devices .* / 4 devices of a"):
        runtime.check_batch(config, 12, 1)

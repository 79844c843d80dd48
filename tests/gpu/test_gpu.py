"""What must hold on a GPU, tried on the first device that JAX finds: `tools/gpu_check.sh` runs these tests.

Without a GPU they compare a CPU with itself, and the tests of kernels that exist on GPUs alone are skipped.
"""

import contextlib
import dataclasses
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Config, LossConfig
from jaxlm.config.files import load
from jaxlm.model import make_model, ring_blocks
from jaxlm.model.attention import Scores, self_attention
from jaxlm.model.ring_blocks import Keys, Queries
from jaxlm.train.backward import loss_sums
from tests.decoders import with_
from tests.runs import CONFIG, assert_identical, numbers, start, state_of, wait_for_step

pytestmark = pytest.mark.gpu
VOCAB, T = 97, 130  # neither is a multiple of a kernel's tile
KINDS: dict[str, dict[str, Any]] = {
    "gpt": {"activation": "gelu", "norm": "layernorm", "position": "learned", "use_bias": True, "tie_embeddings": True},
    "llama": {"activation": "swiglu", "norm": "rmsnorm", "position": "rope", "num_kv_heads": 1, "qk_norm": True},
}
# Largest relative error of a gradient, as a norm. A rounding is off by 2^-24 of the number in float32 and by 2^-8 in
# bfloat16. About 100 roundings follow each other in three layers, forward and back. Those of bfloat16
# are independent, so their squares add up; in float32, approximate functions and long sums are off in one direction.
TOLERANCE = {"float32": 100 * 2.0**-24, "bfloat16": 100**0.5 * 2.0**-8}
ON_GPU = jax.default_backend() == "gpu"


def relative_error(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gradient(config: Config, platform: str, packed: bool) -> Any:
    """The gradient of the sum of the losses, computed by the first device of a platform."""
    model = make_model(config.model, VOCAB, T, platform)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(VOCAB, size=(2, T + 1))
    batch: Any = {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
    if packed:
        batch["positions"] = np.concatenate([np.arange(50), np.arange(T - 50)])[None].repeat(2, 0)
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    with jax.default_device(jax.devices(platform)[0]), jax.default_matmul_precision("highest"):
        params = jax.jit(model.init)(jax.random.key(0))
        # Parameters that start at zero would hide the gradients behind them.
        params = jax.tree.map(lambda p: p + 0.02 * rng.standard_normal(p.shape, np.float32), params)
        grads = jax.jit(jax.grad(lambda p: loss_sums(config, model, p, batch).objective))(params)
    return jax.device_get(grads)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_cpu(kind: str, dtype: str, packed: bool):
    c = load(CONFIG)
    c.model = with_(num_layers=3, d_model=128, num_heads=2, key_offset=False, dtype="float32", **KINDS[kind])
    c.loss = LossConfig(label_smoothing=0.0, z_loss=0.0, chunk=100)
    exact = gradient(c, "cpu", packed)
    c.model = dataclasses.replace(c.model, dtype=dtype, attention="auto", remat="auto", scan_unroll=-1)
    found = gradient(c, jax.default_backend(), packed)
    names = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(exact)}
    for (path, x), expected in zip(jax.tree_util.tree_leaves_with_path(found), names.values(), strict=True):
        name = jax.tree_util.keystr(path)
        if "'key']['bias'" not in name:  # its gradient is 0, because softmax ignores what all scores share
            assert relative_error(x, expected) < TOLERANCE[dtype], name


@pytest.mark.skipif(not ON_GPU, reason="cuDNN's and Triton's kernels run on GPUs alone")
@pytest.mark.parametrize("kernel", ["cudnn", "triton"])
@pytest.mark.parametrize("length", [T, T + 1, 1024])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_fused_attention_equals_xlas(kernel: Any, length: int, packed: bool):
    if packed and kernel == "cudnn":
        pytest.skip("packed documents are the Triton kernel's")
    rng = np.random.default_rng(length)
    shapes = [(2, length, heads, 64) for heads in (4, 2, 2)]
    qkv = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    weights = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)
    segments_BT = jnp.cumsum(jnp.arange(length) % 100 == 0)[None].repeat(2, 0) if packed else None

    def results(kernel: Any, qkv: list[jax.Array]) -> Any:
        def total(qkv: list[jax.Array]) -> jax.Array:
            q_BTHC, k_BTKC, v_BTKC = qkv
            return (self_attention(q_BTHC, k_BTKC, v_BTKC, Scores(64**-0.5), segments_BT, kernel) * weights).sum()

        return jax.jit(jax.value_and_grad(total))(qkv)

    _, grads = results(kernel, qkv)
    with jax.default_matmul_precision("highest"):
        _, expected = results("xla", [x.astype(jnp.float32) for x in qkv])
    for x, y in zip(grads, expected, strict=True):
        assert relative_error(x, y) < TOLERANCE["bfloat16"]


# A model of the same kind as configs/gpt2_124m.py, whose attention is cuDNN's on GPUs.
RUN = {
    "steps": 40, "seq_len": 64, "model.d_model": 128, "model.num_heads": 2, "model.num_kv_heads": 0,
    "model.dtype": "bfloat16", "model.key_offset": False, "deterministic": True, "parallel.devices": 1,
    "checkpoint.every_steps": 20, "eval.every_steps": 0, "log.every_steps": 1,
}  # fmt: skip


def run(workdir: Path, **keys: Any) -> None:
    process = start(workdir, **RUN | keys)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("gpu") / "whole"
    run(workdir)
    return workdir


def assert_same_run(workdir: Path, other: Path) -> None:
    steps, others = ([m for m in numbers(w) if "loss" in m] for w in (workdir, other))  # no evaluation at the end
    assert steps == others and len(steps) == 40
    assert_identical(state_of(workdir, 40, **RUN), state_of(other, 40, **RUN))


def test_a_resumed_run_is_the_same_bit_for_bit(uninterrupted: Path, tmp_path: Path):
    run(tmp_path / "resumed", steps=20)
    run(tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", uninterrupted)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted: Path, tmp_path: Path):
    process = start(tmp_path / "killed", **RUN)
    wait_for_step(process, tmp_path / "killed", 25)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.communicate()
    run(tmp_path / "killed")
    assert_same_run(tmp_path / "killed", uninterrupted)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN's kernels exist on GPUs alone")
@pytest.mark.parametrize("own", [False, True])
def test_a_block_of_ring_attention_by_cudnn_is_that_by_xla(own: bool):
    """Half of the keys, with the softmax and the output of all."""
    rng = np.random.default_rng(0)
    q, g, k, v = (jnp.asarray(rng.standard_normal((2, 128, n, 64)), jnp.bfloat16) for n in (4, 4, 2, 2))
    scores, places = Scores(1 / 8), jnp.arange(128)
    queries, keys = Queries(q, None, places if own else places + 128, 1024), Keys(k, v, None)
    by_xla, by_cudnn = (make(scores) for make in (ring_blocks.by_xla, ring_blocks.by_cudnn))
    both = (jax.jit(b.attend, static_argnums=3)(queries, keys, places, own) for b in (by_xla, by_cudnn))
    (want, lse), (got, got_lse) = both
    assert relative_error(got, want) < TOLERANCE["bfloat16"]
    np.testing.assert_allclose(got_lse, lse, atol=2.0**-7)
    of_all = ring_blocks.OfOutput(g, (want / 2).astype(jnp.bfloat16), lse + np.log(2))  # as if others weighed as much
    grads = (jax.jit(b.gradients, static_argnums=3)(queries, keys, places, own, of_all) for b in (by_cudnn, by_xla))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < TOLERANCE["bfloat16"]

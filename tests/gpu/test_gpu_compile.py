"""The training step compiled for H100s that are not there: `make test-gpu` makes the environment and runs this.

Every reduction, with and without overlap and ZeRO, packed or not, and every configuration compiles; promises about
kernels, memory and communication hold for the compiled program; budgets fail when somebody makes the step worse.
"""

import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import WITHOUT_PARTS, key_types
from jaxlm.config.files import load_file

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-plan/bin/python"
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-plan with JAX's CUDA plugin; `make plan-env`"),
]
FUSED = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
# A small model of the same kind as configs/gpt2_124m.py. No number of devices divides its sizes.
SMALL = ["data.path=x", "model.num_layers=3", "model.d_model=192", "model.num_heads=3", "seq_len=127",
         "model.scan_unroll=1", "model.use_bias=false", "optim.accum_steps=1", "parallel.powersgd_rank=2"]  # fmt: skip
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
REDUCTIONS = key_types()["parallel.reduce"].__args__


def some_path(config: Path) -> list[str]:
    return ["data.path=x"] * (load_file(config).data.source in ("text", "jsonl"))


def job(config: str, overrides: list[str], hosts: int = 1, per_host: int = 8, vocab_size: int = 50_257) -> dict:
    return {"config": config, "overrides": overrides, "hosts": hosts, "per_host": per_host,
            "vocab_size": vocab_size, "device": "H100"}  # fmt: skip


def compile_all(jobs: list[dict]) -> list[dict[str, Any]]:
    """Compiles jobs that agree in XLA's flags: in parallel.overlap and in whether there is more than one device."""
    done = subprocess.run(
        [PYTHON, ROOT / "tests/gpu/worker.py"], input=json.dumps(jobs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def holds_everywhere(found: dict[str, Any]) -> None:
    batch = found["arguments"] - found["in_place"]
    assert batch < 1e-3 * found["arguments"] + 2e5  # all of the state is updated in place


def grid(overlap: bool, hosts: int) -> dict[tuple[str, int, str], dict[str, Any]]:
    """{(reduction, zero, packing): what its program holds}"""
    settings = [
        (reduce, zero, packing)
        for reduce, zero, packing in product(REDUCTIONS, (0, 1), ("concat", "document")[: 3 - hosts])
        if not (zero and reduce in WITHOUT_PARTS)
    ]
    own = [f"parallel.overlap={overlap}", f"batch_size={hosts * 8 * 2}"]
    jobs = [
        job("gpt2_124m.py", [*SMALL, *own, f"parallel.reduce={r}", f"parallel.zero={z}", f"data.packing={p}"], hosts,
            vocab_size=509)
        for r, z, p in settings
    ]  # fmt: skip
    return dict(zip(settings, compile_all(jobs), strict=True))


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_each_reduction_compiles_and_sends_the_bytes_of_its_formula(overlap: bool, hosts: int):
    for (reduce, zero, packing), found in grid(overlap, hosts).items():
        setting = reduce, zero, packing, overlap, hosts
        holds_everywhere(found)
        # XLA joins the all-reduces of gradients with those of single numbers.
        sent = sum(e["sent"] for e in found["exchanges"] if e["purpose"] in ("gradients", "numbers of the step"))
        assert sent == pytest.approx(found["formula"]["gradients"], rel=1e-3, abs=256), setting
        gathers = [e for e in found["exchanges"] if e["purpose"] == "parameters"]
        assert bool(gathers) == bool(zero), setting
        if packing == "concat":
            assert set(found["calls"]) == set(FUSED), setting
        else:  # forward, preparation and backward; no mask, so no attention with a bias
            assert found["calls"].count("__gpu$xla.gpu.triton") >= 3, setting
            assert not any("fmha" in call for call in found["calls"]), setting
        if overlap:
            exchanges = [e for e in found["exchanges"] if e["purpose"] == "gradients" or e["sent"] > 1000]
            assert any(e["kernels"] for e in exchanges), setting
            large = [
                e for e in exchanges if e["kind"] == "all-reduce" and e["sent"] > 0.1 * found["formula"]["gradients"]
            ]
            assert all(e["kernels"] for e in large) and (large or reduce != "pmean" or zero), setting


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_2_and_3_send_the_bytes_of_their_formulas(zero: int):
    jobs = [
        job("gpt2_124m.py", [*SMALL, "batch_size=32", f"parallel.reduce={reduce}", f"parallel.zero={zero}", *own], 2,
            vocab_size=509)
        for reduce, own in (("pmean", ["optim.accum_steps=2"]), ("ring", []), ("fp16", ["model.lora_rank=4"]))
    ]  # fmt: skip
    for found in compile_all(jobs):
        holds_everywhere(found)
        for what, formula in found["formula"].items():
            names = (what, "numbers of the step") if what == "gradients" else (what,)
            sent = sum(e["sent"] for e in found["exchanges"] if e["purpose"] in names)
            assert sent == pytest.approx(formula, rel=1e-3, abs=256), (zero, what)


def test_an_encoder_gathers_its_layers_too_and_attention_is_fused():
    """Encoder and decoder attend to themselves with Triton's kernel, the decoder to the encoder with cuDNN's."""
    sizes = ["model.d_model=256", "model.num_heads=4", "model.dtype=bfloat16", "seq_len=63", "model.encoder_len=255"]
    jobs = [job("seq2seq.py", [*sizes, "batch_size=32", f"parallel.zero={zero}"], vocab_size=509) for zero in (0, 3)]
    for zero, found in zip((0, 3), compile_all(jobs), strict=True):
        holds_everywhere(found)
        assert sum("fmha" in call for call in found["calls"]) >= 2  # forward and backward
        assert found["calls"].count("__gpu$xla.gpu.triton") >= 6
        gathers = [e for e in found["exchanges"] if e["purpose"] == "parameters"]
        assert bool(gathers) == bool(zero)
        sent = sum(e["sent"] for e in gathers)
        assert sent == pytest.approx(found["formula"].get("parameters", 0), rel=1e-3, abs=256)


@pytest.mark.parametrize("unroll", [0, 1])
def test_zero_3_needs_a_part_of_the_memory_and_gathers_beside_computation(unroll: int):
    own = ["data.path=x", "batch_size=128", "optim.accum_steps=2", f"model.scan_unroll={unroll}"]
    plain, parts = (
        compile_all([job("llama_1b.py", [*own, f"parallel.zero={zero}"], vocab_size=32_000)])[0] for zero in (0, 3)
    )
    holds_everywhere(parts)
    assert parts["arguments"] == pytest.approx(plain["arguments"] / 8, rel=0.01)
    # 4.4 GB of gradients, and as much of new parameters, are an eighth each; some layers are whole.
    assert plain["temporary"] - parts["temporary"] > 4e9
    gathers = [e for e in parts["exchanges"] if e["purpose"] == "parameters" and "loop" in e["where"]]
    hidden = sum(e["sent"] for e in gathers if e["kernels"])
    assert hidden > 0.95 * sum(e["sent"] for e in gathers) > 0


GRIDS = [
    ["tensor=2"],
    ["tensor=8", "zero=3"],
    ["context=4", "zero=1"],
    ["pipeline=2", "tensor=4", "chunks=2"],
    ["pipeline=2", "context=2", "tensor=2", "schedule=gpipe"],
]


def test_grids_hold_their_parts_and_send_the_bytes_of_their_formulas():
    """20 layers of `llama_1b` on two hosts with eight GPUs each: a device holds about its part of the model."""
    own = ["data.path=x", "batch_size=64", "optim.accum_steps=4", "model.remat=elementwise", "model.num_layers=20"]
    grids = [[], *([f"parallel.{key}" for key in grid] for grid in GRIDS)]
    plain, *others = compile_all([job("llama_1b.py", [*own, *grid], 2, vocab_size=32_000) for grid in grids])
    for grid, found in zip(grids[1:], others, strict=True):
        holds_everywhere(found)
        sizes = dict(key.removeprefix("parallel.").split("=") for key in grid)
        parts = int(sizes.get("tensor", 1)) * int(sizes.get("pipeline", 1))
        if "context" in sizes:
            assert set(FUSED) <= set(found["calls"])
        if "zero" not in sizes:
            assert found["arguments"] < 1.15 * plain["arguments"] / parts  # stages hold the tables whole
        for what in {"tensor", "pipeline"} & found["formula"].keys():  # XLA joins the sums of copies with others
            sent = sum(e["sent"] for e in found["exchanges"] if e["purpose"] == what)
            assert sent == pytest.approx(found["formula"][what], rel=2e-3, abs=1024), (grid, what)


def test_the_grid_of_llama_405b_is_the_one_that_meta_published():
    """Grattafiori et al., The Llama 3 Herd of Models, table 4: tensor 8, pipeline 16, data 128."""
    command = [PYTHON, "-m", "jaxlm", "plan", "--config", "llama_405b", "--device", "H100", "--devices", "16384"]
    done = subprocess.run([*command, "--recommend", "--config.data.path=x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 16384
    assert {"parallel.tensor=8", "parallel.pipeline=16", "parallel.zero=1"} < set(found["recommended"])
    best = found["ways"][0]
    assert best["seconds"]["total"] == pytest.approx(best["compiled"]["step_seconds"], rel=0.1)
    assert best["memory_bytes"]["total"] == pytest.approx(best["compiled"]["memory_bytes"]["total"], rel=0.1)


@pytest.mark.parametrize("overlap, hosts", [(False, 1), (True, 2)])
def test_each_configuration_compiles(overlap: bool, hosts: int):
    """With the sizes that it ships, for eight GPUs, and with overlap for two hosts with eight each."""
    jobs = []
    for path in CONFIGS:
        own = [*some_path(path), f"parallel.overlap={overlap}", "optim.accum_steps=1", f"batch_size={16 * hosts}"]
        jobs.append(job(path.name, own, hosts))
    for found in compile_all(jobs):
        holds_everywhere(found)


def test_each_configuration_compiles_for_one_device():
    jobs = []
    for path in CONFIGS:
        own = [*some_path(path), "optim.accum_steps=1", "batch_size=2", "parallel.devices=1"]
        jobs.append(job(path.name, own, 1, 1))
    for found in compile_all(jobs):
        holds_everywhere(found)
        assert not found["exchanges"]


MODELS = [
    # configuration, overrides, GB moved in a step, GiB of temporary memory, ms of a step's kernels
    ("gpt2_124m", [], 226, 4.4, 98),
    ("gpt2_124m", ["batch_size=96", "optim.accum_steps=1"], 49.5, 3.9, 21),
    ("gpt2_xl", ["batch_size=128", "optim.accum_steps=1"], 445, 35, 281),
    ("llama_1b", ["batch_size=32", "optim.accum_steps=1", "seq_len=4096"], 259, 20.3, 203),
]


def test_the_models_stay_within_their_budgets():
    """A little above what was planned when the budgets were set. Raise one only with a reason in the commit."""
    jobs = [
        job(f"{name}.py", ["data.path=x", *own], vocab_size=32_000 if name == "llama_1b" else 50_257)
        for name, own, *_ in MODELS
    ]
    for (name, own, moved, temporary, milliseconds), found in zip(MODELS, compile_all(jobs), strict=True):
        holds_everywhere(found)
        assert found["float32_products"] == [], name  # all of a bfloat16 model are bfloat16's
        assert set(found["calls"]) == set(FUSED), name
        assert found["moved"] / 1e9 < moved, (name, own, found["moved"] / 1e9)
        assert found["temporary"] / 2**30 < temporary, (name, own, found["temporary"] / 2**30)
        assert found["computation_seconds"] * 1e3 < milliseconds, (name, own, found["computation_seconds"] * 1e3)


@pytest.mark.parametrize("unroll", [0, 1])
def test_overlap_needs_no_more_than_a_tenth_of_the_memory(unroll: int):
    own = ["data.path=x", "batch_size=480", f"model.scan_unroll={unroll}"]  # five micro-batches
    plain, overlapped = (
        compile_all([job("gpt2_124m.py", [*own, f"parallel.overlap={overlap}"])])[0] for overlap in (False, True)
    )
    total = [f["arguments"] + f["temporary"] for f in (plain, overlapped)]
    assert total[1] < 1.1 * total[0], total

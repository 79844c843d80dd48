"""The bytes that a compiled step moves, read from its text, agree with the strategies' formulas."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.commands import bench_comm
from jaxlm.config.files import load
from jaxlm.plan.collectives import _group_size, collectives
from jaxlm.plan.program import parse
from tests.grids import PAIRS

CONFIG = Path(__file__).parents[2] / "configs/debug.py"
# Sizes that no number of devices divides, and no Muon, which would also share its layers.
SMALL = [
    "batch_size=24",
    "seq_len=8",
    "model.num_layers=3",
    "model.d_model=20",
    "model.num_heads=2",
    "optim.name=adamw",
    "model.scan_unroll=1",
    "parallel.powersgd_rank=2",
]
ENCODER = [
    "parallel.devices=4",
    "parallel.tensor=2",
    "model.encoder_layers=2",
    "model.encoder_len=24",
    *PAIRS,
    "data.tokenizer=bytes",
]


def report(*overrides: str) -> dict[str, Any]:
    config = load(CONFIG, [f"--config.{o}" for o in (*SMALL, *overrides)])
    return json.loads(json.dumps(bench_comm.report(config, 29)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.reduce=pmean", "parallel.devices=3"],
        ["parallel.reduce=ring", "parallel.devices=4", "parallel.zero=1"],
        ["parallel.reduce=bf16", "parallel.devices=3", "parallel.overlap=true"],
        ["parallel.reduce=fp16", "parallel.devices=4"],
        ["parallel.reduce=int8", "parallel.devices=2"],
        ["parallel.reduce=topk", "parallel.devices=3"],
        ["parallel.reduce=int8", "parallel.devices=6", "parallel.overlap=true"],
        ["parallel.reduce=powersgd", "parallel.devices=4", "parallel.overlap=true"],
        ["parallel.reduce=bf16", "parallel.devices=4", "parallel.zero=2", "optim.accum_steps=2"],
        ["parallel.reduce=pmean", "parallel.devices=3", "parallel.zero=3", "model.dtype=float16"],
        [
            "parallel.reduce=ring",
            "parallel.devices=4",
            "parallel.zero=3",
            "model.dtype=bfloat16",
            "optim.accum_steps=3",
        ],
    ],
    ids=lambda o: "-".join(x.split("=")[1] for x in o),
)
def test_program_and_formula_agree(overrides: list[str], capsys: pytest.CaptureFixture[str]):
    result = report(*overrides)
    assert result["agrees"], result
    assert result["bytes_sent"]["gradients"] > 0
    out = capsys.readouterr().out
    assert "by the formula" in out and "do not agree" not in out
    config = load(CONFIG, [f"--config.{o}" for o in (*SMALL, *overrides)])
    inside = [c for c in result["collectives"] if c["where"] == "loop of the backward pass"]
    assert bool(inside) == config.parallel.by_layer
    if inside and config.optim.accum_steps == 1:
        assert all(c["times"] % 3 == 0 for c in inside)  # for each of three layers
        assert sum(c["sent"] * c["times"] for c in inside) > 0.6 * result["bytes_sent"]["gradients"]
    assert ("parameters" in result["bytes_sent"]) == (config.parallel.zero > 0)
    if config.parallel.zero == 3:  # the layers twice in each micro-batch, and not the whole model at once
        assert result["bytes_sent"]["parameters"] > 0.9 * result["parameter_bytes_by_formula"]
        assert result["parameter_bytes_by_formula"] > 1.5 * result["bytes_sent"]["gradients"] / (
            2 if config.model.dtype == "bfloat16" else 1
        )


@pytest.mark.parametrize(
    "overrides, within",
    [
        (["parallel.devices=4", "parallel.tensor=2", "model.remat=full", "parallel.zero=1"], ["tensor", "copies"]),
        pytest.param([*ENCODER, "model.remat=full"], ["tensor", "copies"], marks=pytest.mark.ci),
        ([*ENCODER, "model.remat=elementwise", "optim.accum_steps=2"], ["tensor", "copies"]),
        pytest.param([*ENCODER, "model.remat=none"], ["tensor", "copies"], marks=pytest.mark.ci),
        (["parallel.devices=4", "parallel.context=4", "model.remat=elementwise", "parallel.zero=3"], ["context"]),
        (["parallel.devices=6", "parallel.pipeline=3", "optim.accum_steps=4"], ["pipeline", "copies"]),
        (
            [
                "parallel.devices=4",
                "parallel.pipeline=2",
                "parallel.chunks=2",
                "parallel.tensor=2",
                "model.num_layers=8",
                "optim.accum_steps=4",
                "model.remat=elementwise",
            ],
            ["tensor", "pipeline", "copies"],
        ),
    ],
    ids=lambda o: "-".join(x.split("=")[-1] for x in o),
)
def test_bytes_in_each_direction_of_a_grid(overrides: list[str], within: list[str], capsys: pytest.CaptureFixture[str]):
    result = report(*overrides)
    assert result["agrees"], capsys.readouterr().out
    assert all(result["bytes_sent"][what] > 0 for what in within)
    assert not {"tensor", "context", "pipeline", "copies"} - set(within) & result["bytes_sent"].keys()


def test_bytes_of_each_kind_of_collective():
    """Counts the collectives of a program with known numbers, also in nested loops."""

    def program(x: jax.Array) -> Any:
        def body(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            y, _ = jax.lax.scan(
                lambda z, _: (jax.lax.ppermute(z, "d", [(0, 1), (1, 2), (2, 3), (3, 0)]), None), y, None, 5
            )
            return jax.lax.psum(y, "d"), None

        x, _ = jax.lax.scan(body, x, None, length=3)
        groups = [[0, 1], [2, 3]]
        return (
            jax.lax.all_gather(x, "d"),
            jax.lax.psum_scatter(x, "d", tiled=True, axis_index_groups=groups),
            jax.lax.all_to_all(x.astype(jnp.int8), "d", 0, 0, tiled=True),
        )

    text = jax.pmap(program, axis_name="d", devices=jax.devices()[:4]).lower(jnp.ones((4, 400))).compile().as_text()
    found = {c.kind: c for c in collectives(parse(text))}
    assert {k: (c.times, c.size, c.sent, c.dtypes) for k, c in found.items() if k != "collective-permute"} == {
        "all-reduce": (3, 4, 2 * 3 / 4 * 1600, "f32"),
        "all-gather": (1, 4, 3 * 1600, "f32"),
        "reduce-scatter": (1, 2, 800, "f32"),
        "all-to-all": (1, 4, 300, "s8"),
    }
    assert (found["collective-permute"].times, found["collective-permute"].sent) == (15, 1600)


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['d'=8] {'d'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8], device_ids=([8]) {'a':(2)4}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_size_of_a_group(groups: str, size: int):
    """The forms that jax 0.10 to 0.12 write."""
    assert _group_size(f"%x = f32[8]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add") == size


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match="unknown groups"):
        _group_size("%x = f32[8]{0} all-reduce(%y), replica_groups=other(8), to_apply=%add")

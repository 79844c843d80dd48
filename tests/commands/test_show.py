"""`jaxlm show` lists every array, its FLOPs add up, and it shows the checkpoints of a run."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxlm.commands.show import model_table
from jaxlm.config.files import load
from jaxlm.model import make_model, num_params
from jaxlm.train import trained
from tests.exit_codes import tool
from tests.runs import CONFIG


@pytest.mark.parametrize("tied, position, rank", [(True, "rope", 0), (False, "learned", 0), (True, "rope", 2)])
def test_the_rows_add_up(tied: bool, position: str, rank: int):
    keys = {"model.tie_embeddings": str(tied).lower(), "model.position": position, "model.num_layers": 3}
    keys |= {"model.lora_rank": str(rank)}
    if tied:
        keys |= {"model.head_dim": "8", "model.window": "9", "model.global_every": "2"}
    config = load(CONFIG, [f"--config.{key}={value}" for key, value in keys.items()])
    params = make_model(config.model, 99, config.seq_len).shapes()
    rows = model_table(config, params).rows
    assert len(rows) == len(jax.tree.leaves(params)) + 1  # attention's own products
    assert sum(int(row[2].replace(",", "") or 0) for row in rows) == num_params(params)
    units = {"": 1.0, "k": 1e3, "M": 1e6}
    flops = [float(number) * units[unit] for number, _, unit in (row[3].partition(" ") for row in rows)]
    assert sum(flops) == pytest.approx(trained.flops_per_token(config, params), rel=0.01)
    assert any(row[0] == "final_norm/scale (frozen)" for row in rows) == bool(rank)
    shapes = {row[0].removesuffix(" (frozen)"): row[1] for row in rows}
    assert shapes["embed/embedding"] == f"99 x {config.model.d_model}"
    assert ("head/kernel" in shapes) != tied and ("positions/embedding" in shapes) == (position == "learned")


def test_a_run_shows_its_checkpoints_and_last_metrics(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert tool("show", finished) == 0
    lines = capsys.readouterr().out.splitlines()
    model, checkpoints, last = "\n".join(lines).split("\n\n")
    assert "embed/embedding" in model and " parameters; " in model and "FLOPs a training token" in model
    score = next(m for m in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()) if "eval_loss" in m)
    assert [line.split()[0] for line in checkpoints.splitlines()[1:]] == ["2", "1"]
    assert f"{score['eval_loss']:.4f} (best)" in checkpoints.splitlines()[1]
    assert [line.split()[1] for line in last.splitlines() if line.split()[0] == "step"] == ["2"]


def test_mistakes_end_in_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "metrics.jsonl").write_text("nonsense\n")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "empty"], "no config.json"),
        ([finished, "--config.steps=3"], "--config.steps=3"),
        ([finished, "--vocab_size", 9], "--vocab_size"),
        ([CONFIG, "--vocab_size", 1], "--vocab_size is 1"),
        ([CONFIG, "--config.stepz=1"], "stepz"),
        (["no_such_name"], "no_such_name"),
        ([copy], "metrics.jsonl: line 1"),
    ):
        assert tool("show", *arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and len(error.splitlines()) == 1 and words in error

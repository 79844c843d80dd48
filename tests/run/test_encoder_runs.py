"""Runs with an encoder: what they learn, how they resume, and what the commands make of them."""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import main
from jaxlm.config import Config, UserError
from jaxlm.config.files import load
from jaxlm.data.pairs import pack_pairs
from jaxlm.data.tokens import Tokens
from jaxlm.host.exit_codes import exit_code
from jaxlm.run.answers import check_single
from jaxlm.run.open_run import open_run
from tests.exit_codes import tool
from tests.runs import CONFIG, flags, lines

STEPS = 200


def reversed_words() -> list[tuple[str, str]]:
    rng = random.Random(0)
    words = {"".join(rng.choices("abcdef", k=rng.randint(3, 6))) for _ in range(3000)}
    return [(word, word[::-1]) for word in sorted(words)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of runs that reverse words, which nobody can without reading them."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "words.jsonl").write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in reversed_words()))
    return {
        "folder": folder,
        "model.encoder_layers": 1,
        "model.encoder_len": 32,
        "model.num_layers": 2,
        "model.d_model": 48,
        "model.num_heads": 2,
        "model.dropout": 0.0,
        "seq_len": 32,
        "batch_size": 32,
        "optim.name": "muon",
        "optim.lr": 0.02,
        "optim.ema_decay": 0.0,
        "optim.schedule": "linear",
        "optim.warmup_steps": 10,
        "data.source": "jsonl",
        "data.path": folder / "words.jsonl",
        "data.prompt_key": "a",
        "data.response_key": "b",
        "data.chat_template": "",
        "data.packing": "document",
        "data.tokenizer": "bytes",
        "data.cache_dir": folder / "cache",
        "eval.every_steps": 0,
        "eval.sample_prompt": "abc",
        "checkpoint.every_steps": 0,
        "log.every_steps": 10,
        "steps": STEPS,
    }


def run(keys: dict[str, Any], name: str, **more: Any) -> int:
    own = {k.replace(".", "__"): v for k, v in keys.items() if k != "folder"}
    argv = ["--config", str(CONFIG), "--workdir", str(keys["folder"] / name), *flags(**(own | more))]
    return exit_code(lambda: main.run(argv))


@pytest.fixture(scope="module")
def finished(keys: dict[str, Any]) -> Path:
    assert run(keys, "whole") == 0
    return keys["folder"] / "whole"


def test_held_out_words_are_reversed(finished: Path, capsys: pytest.CaptureFixture[str]):
    last = lines(finished)[-1]
    assert last["eval_accuracy"] > 0.95 and last["eval_loss"] < 0.2
    assert last["sample"] == "abc\ncba"
    for word in ("abcd", "fade", "bee"):
        assert tool("generate", "--workdir", finished, "--prompt", word, "--temperature", 0) == 0
        assert capsys.readouterr().out == word[::-1] + "\n"
    long = "abcdef" * 10
    assert tool("generate", "--workdir", finished, "--prompt", long, "--max_new_tokens", 3, "--num_samples", 2) == 0
    assert (
        "the prompt has 61 tokens; the model sees the first 32 of them (model.encoder_len)" in capsys.readouterr().err
    )


def test_an_evaluation_gives_the_score_of_the_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert tool("evaluate", "--workdir", finished) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval_loss"] == pytest.approx(lines(finished)[-1]["eval_loss"], rel=1e-6)
    # Longer rows hold more pairs, and each is scored as before.
    assert tool("evaluate", "--workdir", finished, "--config.model.encoder_len=48", "--config.seq_len=48") == 0
    longer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert longer["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert longer["eval_tokens"] == found["eval_tokens"]


def test_other_runs_may_read_longer_prompts(finished: Path, keys: dict[str, Any]):
    def config(**more: Any) -> Config:
        own = {k.replace(".", "__"): v for k, v in keys.items() if k not in ("folder", "model.encoder_len")}
        return load(CONFIG, flags(**(own | {"checkpoint__resume": finished} | more)))

    assert config().model.encoder_len == 32 and config(model__encoder_len=48).model.encoder_len == 48
    with pytest.raises(UserError, match=r"model\.encoder_layers is 2; allowed: 1, as in"):
        config(model__encoder_layers=2)


def test_conversations_of_several_answers_have_no_exact_match():
    ids = np.array([0, 5, 6, 7, 0, 5, 6, 5, 6, 0, 5], np.int32)
    learned = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0], bool)
    tokens = Tokens([ids], [learned], starts=lambda: np.array([0, 4, 9]), end=0)
    message = "1 of 3 conversations of the validation set have more than one answer"
    with pytest.raises(UserError, match=message):
        check_single(tokens, pack_pairs(tokens, 8, 8))
    tokens = Tokens([ids[:4]], [learned[:4]], starts=lambda: np.array([0]), end=0)
    check_single(tokens, pack_pairs(tokens, 8, 8))


def test_answers_to_other_prompts_are_written(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the order of the file, and as `jaxlm generate` makes them one by one."""
    words, new = ["abc", "fade", "beef", "a" * 40, ""] * 14, tmp_path / "answers.jsonl"
    records = "".join(json.dumps({"a": word, "b": word[::-1] + "x" * (i < 5)}) + "\n" for i, word in enumerate(words))
    (tmp_path / "others.jsonl").write_text(records.replace('"b": ""', '"b": "-"'))
    argv = ["--workdir", finished, "--answers", new, f"--config.data.val_path={tmp_path / 'others.jsonl'}"]
    assert tool("evaluate", *argv) == 0
    found = [json.loads(line) for line in new.read_text().splitlines()]
    assert [answer["prompt"] for answer in found] == words
    share = sum(answer["answer"] == answer["expected"] for answer in found) / len(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exact_match"] == share > 0.5
    for answer in found[:5]:
        argv = ["--prompt", answer["prompt"], "--temperature", 0, "--max_new_tokens", 32]
        assert tool("generate", "--workdir", finished, *argv) == 0
        assert capsys.readouterr().out == answer["answer"] + "\n"
    assert tool("evaluate", "--workdir", finished, "--answers", new) == 2
    assert "allowed: a new file" in capsys.readouterr().err
    files = sorted(tmp_path.iterdir())
    assert tool("evaluate", "--workdir", finished, "--answers", tmp_path / ("x" * 250)) == 2
    said = capsys.readouterr()
    assert "File name too long; allowed: a new file in a writable folder" in said.err and not said.out
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.ci
def test_a_stopped_run_ends_as_one_that_was_not_also_when_divided_otherwise(keys: dict[str, Any]):
    """Bit for bit on the same devices; with ZeRO-3 to float rounding."""
    more = {"steps": 4, "optim__warmup_steps": 1, "log__every_steps": 1, "checkpoint__every_steps": 2}
    assert run(keys, "four", **more) == 0
    whole = open_run(keys["folder"] / "four", None)
    for name, way in (("same", {}), ("zero", {"parallel__zero": 3})):
        workdir = keys["folder"] / name
        shutil.copytree(whole.folder, workdir)
        shutil.rmtree(workdir / "checkpoints/4")  # as if it had stopped after step 3
        assert run(keys, name, **more, **way) == 0
        parts = open_run(workdir, None)
        assert parts.step == 4
        if way:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), parts.params, whole.params)
            losses = [[m["loss"] for m in lines(folder) if "loss" in m] for folder in (workdir, whole.folder)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        else:
            jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


@pytest.mark.parametrize(
    "command, argv",
    [("export_hf", ["{run}", "{new}"]), ("evaluate", ["--workdir", "{run}", "--tasks", "arc_easy"])],
)
def test_what_only_decoders_can_do_is_refused(
    finished: Path, tmp_path: Path, command: str, argv: list[str], capsys: pytest.CaptureFixture[str]
):
    if command == "evaluate":
        pytest.importorskip("lm_eval")
    filled = [arg.format(run=finished, new=tmp_path / "new") for arg in argv]
    assert tool(command, *filled) == 2
    assert "model.encoder_layers is 1; allowed: 0, because" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

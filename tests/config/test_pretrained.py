"""The weights of another run bring its model keys and its tokenizer, so the first loss equals that run's last."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import Config, UserError
from jaxlm.config.files import load, load_workdir
from jaxlm.config.pretrained import Weights, brought_by, named_weights
from jaxlm.data import TrainOrder, prepare
from jaxlm.run import training
from jaxlm.run.open_run import open_run, score
from tests.decoders import logits_of
from tests.exit_codes import contents, in_process
from tests.runs import CONFIG, lines

ANIMALS = "".join(
    f"the {'big' if i % 3 else 'small'} {'fox' if i % 2 else 'dog'} knew {i % 7} cats\n" for i in range(300)
)
# All values differ from configs/debug.py, the configuration of the runs that start from these weights.
MODEL = {"model.d_model": 16, "model.num_heads": 4, "model.position": "learned", "model.key_offset": False,
         "model.norm": "layernorm", "seq_len": 24}  # fmt: skip
SMALL = {"batch_size": 8, "steps": 4, "optim.name": "adamw", "optim.warmup_steps": 0, "optim.ema_decay": 0.5,
         "parallel.devices": 2, "model.scan_unroll": 1, "log.tensorboard": False, "checkpoint.every_steps": 1,
         "checkpoint.keep": 9, "eval.every_steps": 1, "eval.sample_tokens": 0, "data.source": "text"}  # fmt: skip


def flags(**keys: Any) -> list[str]:
    return [f"--config.{k.replace('__', '.')}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns a folder with two texts and `pre`, a run on animals.txt that keeps the checkpoint of each step."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "animals.txt").write_text(ANIMALS)
    (folder / "birds.txt").write_text(ANIMALS.replace("fox", "owl").replace("dog", "hen"))
    keys = SMALL | MODEL | {"data.tokenizer": "chars", "data.path": folder / "animals.txt", "optim.lr": 0.01}
    assert training.run(load(CONFIG, flags(**keys)), folder / "pre") == 0
    yield folder


def config_of(folder: Path, workdir: Path | None = None, **keys: Any) -> Config:
    wanted = SMALL | {"data.path": folder / "animals.txt", "checkpoint.resume": folder / "pre", "steps": 1}
    return load(CONFIG, flags(**(wanted | {k.replace("__", "."): v for k, v in keys.items()})), workdir)


def test_the_first_loss_is_that_of_the_old_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The losses before and in step 1 are those of the old weights, although the configuration names another model and
    another tokenizer.
    """
    config = config_of(folder, seed=3)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"as in {folder / 'pre'}" in said
    for key, value in MODEL.items():
        assert f"{key}={value} (not " in said
    assert config.data.tokenizer == "chars" and config.data.tokenizer_path == str(folder / "pre/tokenizer")
    assert training.run(config, tmp_path / "new") == 0

    before = [m for m in lines(folder / "pre") if "eval_loss" in m][-1]
    scores = score(open_run(tmp_path / "new", 0), load_workdir(tmp_path / "new"))
    assert scores["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert scores["eval_bits_per_byte"] == pytest.approx(before["eval_bits_per_byte"], rel=1e-6)
    assert before["eval_loss"] < np.log(28) - 0.2  # the old run had learned something

    old = open_run(folder / "pre", None)
    batch = next(iter([TrainOrder(prepare(config, progress=False), config).batches(0, 1)]))
    inputs, targets = (batch[k].reshape(8, 24) for k in ("inputs", "targets"))
    logits = np.asarray(jax.jit(logits_of(old.model))(old.params, inputs), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    loss = (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
    assert lines(tmp_path / "new")[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "key, asked, there",
    [("model.key_offset", True, False), ("model.position", "rope", "learned"), ("model.d_model", 32, 16),
     ("seq_len", 16, 24), ("model.tie_embeddings", True, False), ("model.logit_softcap", 5.0, 0.0),
     ("data.tokenizer", "bytes", "chars"), ("data.vocab_size", 300, 28)],
)  # fmt: skip
def test_a_key_that_contradicts_the_weights_is_refused(
    key: str, asked: Any, there: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A contradicting key is refused on a command line, and in a configuration that a program makes."""
    keys = SMALL | {"data.path": folder / "animals.txt", "checkpoint.resume": folder / "pre", key: asked}
    code, said = in_process(["--config", str(CONFIG), "--workdir", str(tmp_path / "new"), *flags(**keys)], capsys)
    assert code == 2 and said.count("\n") == 1
    assert f"{key} is {asked!r}; allowed: {there!r}, as in {folder / 'pre'}" in said
    config = config_of(folder)
    holder: Any = config
    for section in key.split(".")[:-1]:
        holder = getattr(holder, section)
    setattr(holder, key.rsplit(".", 1)[-1], asked)
    with pytest.raises(UserError, match=f"{key} is {asked!r}; allowed: {there!r}"):
        training.run(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_keys_that_do_not_fit_the_model_of_the_weights_name_its_run(folder: Path):
    message = f"model.num_heads is 4; .* parallel.tensor = 8; the model's keys are those of {folder / 'pre'}, whose"
    with pytest.raises(UserError, match=message):
        config_of(folder, parallel__devices=8, parallel__tensor=8)


def test_keys_that_do_not_change_the_models_function_may_differ(folder: Path):
    free = {"model.dtype": "bfloat16", "model.dropout": 0.1, "model.remat": "full", "model.attention": "xla",
            "model.scan_unroll": 2, "model.matmul_precision": "highest", "model.param_dtype": "bfloat16",
            "model.residual_init": "scaled", "model.d_model": 16}  # fmt: skip
    config = config_of(folder, None, **free)  # d_model is the same as in the weights
    assert (config.model.dtype, config.model.dropout, config.model.d_model) == ("bfloat16", 0.1, 16)


def test_a_copy_of_the_tokenizer_is_accepted_and_another_tokenizer_is_refused(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "pre/tokenizer", tmp_path / "copy")
    assert training.run(config_of(folder, data__tokenizer_path=tmp_path / "copy"), tmp_path / "new") == 0
    spec = tmp_path / "copy/jaxlm_tokenizer.json"
    spec.write_text(json.dumps({"kind": "chars", "alphabet": sorted(set(ANIMALS) | {"Z"})}))
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=rf"data\.tokenizer_path is '{tmp_path}/copy'; allowed: '{folder}/pre/tokenizer'"
    ):
        training.run(config_of(folder, data__tokenizer_path=tmp_path / "copy"), tmp_path / "other")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("gone", [False, True])
def test_the_same_command_resumes_the_new_run(gone: bool, folder: Path, tmp_path: Path):
    """Resuming and evaluating need only the new run's folder, so the run that the weights came from may be gone."""
    shutil.copytree(folder / "pre", tmp_path / "pre")

    def train(steps: int) -> int:
        keys = {"checkpoint.resume": tmp_path / "pre", "data.path": folder / "birds.txt", "steps": steps}
        return training.run(config_of(folder, tmp_path / "new", **keys), tmp_path / "new")

    assert train(1) == 0
    if gone:
        shutil.rmtree(tmp_path / "pre")
    assert train(2) == 0
    assert [m["step"] for m in lines(tmp_path / "new") if "loss" in m] == [1, 2]
    saved = json.loads((tmp_path / "new/config.json").read_text())
    assert [h["changed"] for h in saved["history"]] == ["steps 1 -> 2"]
    scores = score(open_run(tmp_path / "new", None), load_workdir(tmp_path / "new"))
    assert scores["eval_loss"] == pytest.approx(lines(tmp_path / "new")[-1]["eval_loss"], rel=1e-6)
    with pytest.raises(UserError, match=r"model\.d_model was 16 and is now 32"):
        keys = {"checkpoint.resume": tmp_path / "pre", "data.path": folder / "birds.txt", "model.d_model": 32}
        training.run(config_of(folder, tmp_path / "new", steps=2, **keys), tmp_path / "new")


def test_weights_can_be_chosen_by_step_or_as_best(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(folder / "pre", tmp_path / "a@b")
    with (tmp_path / "a@b/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval_loss": 0.001}\n{"step": 77, "eval_loss": 0.0}\n')  # step 77 has no checkpoint
    for name, step in (("a@b", 4), ("a@b@3", 3), ("a@b@best", 2)):
        assert training.run(config_of(folder, checkpoint__resume=tmp_path / name), tmp_path / f"from {step}") == 0
        assert f"starts from the weights of step {step} in {tmp_path / 'a@b'}" in capsys.readouterr().out
        want, got = open_run(folder / "pre", step).params, open_run(tmp_path / f"from {step}", 0).params
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert open_run(tmp_path / "a@b", "best").step == 2
    with pytest.raises(
        UserError, match=r"checkpoint\.resume is '.*a@b@9': no .*; allowed: best, or one of 0, 1, 2, 3, 4"
    ):
        training.run(config_of(folder, checkpoint__resume=tmp_path / "a@b@9"), tmp_path / "no")
    (tmp_path / "a@b/metrics.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"--step best: no checkpoint in .* has a validation loss; allowed: one of 0, 1, 2, 3, 4"
    ):
        open_run(tmp_path / "a@b", "best")
    assert not (tmp_path / "no").exists()


def test_weights_are_named_by_a_folder_and_an_optional_step(tmp_path: Path):
    (tmp_path / "a@7").mkdir()
    assert [named_weights(text) for text in ("auto", "never")] == [None, None]
    assert named_weights(f"{tmp_path}/a@7") == Weights(tmp_path / "a@7", None)  # a folder with this name exists
    assert named_weights("runs/b@7") == Weights(Path("runs/b"), 7)
    assert named_weights("me@host") == Weights(Path("me@host"), None)


def test_the_line_about_weights_lists_only_the_keys_they_bring(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The line names no key that the command line sets, and no value that the optimizer has of its own."""
    config_of(folder, optim__name="lion", optim__lr="none", seed=3)
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("checkpoint.resume: ") and "model.d_model=16" in said
    assert not any(key in said for key in ("optim.", "seed=", "checkpoint.resume=", "steps="))


@pytest.mark.parametrize("kind", ["words", 3, None])
def test_a_tokenizer_of_an_unknown_kind_is_refused(kind: Any, tmp_path: Path):
    path = tmp_path / "tokenizer/jaxlm_tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": kind}))
    with pytest.raises(UserError, match=rf"{path}: kind is {kind!r}; allowed: sentencepiece"):
        brought_by(tmp_path, load(CONFIG), 9)


@pytest.mark.parametrize("source", ["text", "synthetic"])
def test_data_of_another_vocabulary_is_refused(source: str, folder: Path, finished: Path, tmp_path: Path):
    """Text is refused for the weights of a run on bare ids, and other ids are refused for those of a run on text."""
    keys: dict[str, Any] = {"data.source": source, "checkpoint.resume": finished}
    if source == "synthetic":
        store = prepare(config_of(folder, checkpoint__resume="auto", data__tokenizer="bytes"), progress=False).folder
        keys = {"data.source": "tokens", "data.path": store}
    words = r"data\.source is 'text'; allowed: tokens" if source == "text" else "257 token ids are not those of"
    with pytest.raises(UserError, match=words):
        training.run(config_of(folder, **keys), tmp_path / "new")
    assert not (tmp_path / "new").exists()

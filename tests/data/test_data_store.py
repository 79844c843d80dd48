"""The token store is made once, complete or not at all, and checked when it is opened."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.commands import prepare as prepare_data
from jaxlm.config import Config, UserError
from jaxlm.data import compression_baselines, open_store, prepare, store_reader
from jaxlm.data import store as store_lib
from jaxlm.data.progress import track
from jaxlm.data.sources.opening import open_source
from jaxlm.data.token_file import TokenFile
from tests.corpora import LINES, documents, make_config, open_corpus, text, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "sentencepiece"])
def test_store_holds_the_text(config: Config, tmp_path: Path, tokenizer: str):
    files = {f"d/{i:02}.txt": f"naïve \u2581 {i}\r\n" + LINES for i in range(20)}
    write(tmp_path, files)
    corpus = open_corpus(config, tmp_path / "d", tokenizer=tokenizer, val_fraction=0.2, vocab_size=400)
    assert corpus.tokenizer is not None and corpus.bytes_per_token is not None and corpus.folder is not None
    for split in ("train", "val"):
        expected = "".join(d.text for d in documents(open_source(config.data), split))
        assert text(corpus, split) == expected
        facts, tokens = corpus.facts[split], getattr(corpus, split)
        ids = np.asarray(tokens)
        assert facts["bytes"] == len(expected.encode()) == corpus.bytes_per_token[ids].sum()
        assert facts["tokens"] == len(tokens) == len(ids)
        assert facts["documents"] == len(tokens.starts)
        np.testing.assert_array_equal(np.flatnonzero(ids == corpus.tokenizer.bos_id), tokens.starts)
    assert corpus.train.dtype == np.dtype("<u2") and isinstance(corpus.train.shards[0], TokenFile)
    assert corpus.vocab_size == corpus.tokenizer.vocab_size == len(corpus.bytes_per_token)


def test_store_is_made_once_and_the_same_everywhere(config: Config, tmp_path: Path, monkeypatch):
    write(tmp_path, {"a.txt": LINES})
    config.data.tokenizer, config.data.vocab_size = "sentencepiece", 350
    first = open_corpus(config, tmp_path / "a.txt")
    other = open_corpus(config, tmp_path / "a.txt", cache_dir=str(tmp_path / "other"))
    assert first.folder and other.folder and first.folder.name == other.folder.name
    assert first.fingerprint == other.fingerprint
    for path in (p for p in first.folder.rglob("*") if p.is_file()):
        assert path.read_bytes() == (other.folder / path.relative_to(first.folder)).read_bytes(), path.name
    monkeypatch.setattr(store_lib, "make_shards", lambda *a: pytest.fail("built again"))
    assert prepare(config, progress=False).fingerprint == first.fingerprint


def test_every_setting_that_shapes_a_store_changes_its_name(config: Config, tmp_path: Path):
    write(tmp_path, {"a.txt": LINES, "b.txt": LINES + "more"})
    stores = [
        open_corpus(config, tmp_path / "a.txt").folder,
        open_corpus(config, tmp_path / "b.txt").folder,
        open_corpus(config, tmp_path / "a.txt", val_fraction=0.1).folder,
        open_corpus(config, tmp_path / "a.txt", tokenizer="chars").folder,
        open_corpus(config, tmp_path / "a.txt", tokenizer="sentencepiece", vocab_size=310).folder,
        open_corpus(config, tmp_path / "a.txt", tokenizer="sentencepiece", vocab_size=320).folder,
    ]
    write(tmp_path, {"a.txt": LINES.replace("fox", "fix")})  # as long as before
    stores.append(open_corpus(config, tmp_path / "a.txt").folder)
    for word in ("fix", "fax"):
        write(tmp_path, {f"d/{i}": LINES.replace("fox", word) for i in range(9)})
        stores.append(open_corpus(config, tmp_path / "d", val_fraction=0.25).folder)
    assert len(set(stores)) == len(stores)
    config.seed, config.steps = 5, 7
    assert prepare(config).folder == stores[-1]


def test_a_folder_that_is_no_store_is_left_alone(config: Config, tmp_path: Path):
    path = write(tmp_path, {"a.txt": LINES}) / "a.txt"
    folder = open_corpus(config, path).folder
    assert folder
    shutil.rmtree(folder)
    write(folder, {"precious.txt": "theirs"})
    with pytest.raises(UserError, match=f"{folder.name}: not a complete token store"):
        open_corpus(config, path)
    assert (folder / "precious.txt").read_text() == "theirs"


def test_a_cache_that_cannot_be_written_is_refused(config: Config, tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere but there
        locked = Path("/proc/locked")
    with pytest.raises(UserError, match=r"data\.cache_dir .*locked"):
        open_corpus(config, write(tmp_path, {"a.txt": LINES}) / "a.txt", cache_dir=str(locked / "in"))


def test_a_cache_that_is_a_file_is_refused(config: Config, tmp_path: Path):
    write(tmp_path, {"a.txt": LINES})
    with pytest.raises(UserError, match=r"data\.cache_dir .*a\.txt"):
        open_corpus(config, tmp_path / "a.txt", cache_dir=str(tmp_path / "a.txt"))


def test_damaged_stores_are_named(config: Config, tmp_path: Path, monkeypatch):
    folder = open_corpus(config, write(tmp_path, {"a.txt": LINES}) / "a.txt").folder
    assert folder
    shard = folder / "val/00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"val/00000\.bin: {len(content) - 2} bytes; allowed: {len(content)}"):
        prepare(config)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"val/00000\.bin: content does not match its manifest"):
        prepare(config)
    monkeypatch.setattr(store_reader, "CHECKED_BYTES", 0)  # as for a large store, whose content is not checked
    prepare(config)
    with pytest.raises(UserError, match=r"val/00000\.bin: content does not match its manifest"):
        open_store(folder, verify=True)
    shard.unlink()
    with pytest.raises(UserError, match=r"val/00000\.bin: no such file"):
        prepare(config)
    shard.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for broken in ("", "[]", json.dumps(manifest | {"format": 99}), json.dumps({"format": 1})):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_store(folder)


def test_a_prepared_store_needs_nothing_else(config: Config, tmp_path: Path):
    made = open_corpus(config, write(tmp_path, {"a.txt": LINES}) / "a.txt")
    (tmp_path / "a.txt").unlink()
    assert made.folder
    config.data.source = "tokens"
    opened = open_corpus(config, made.folder)
    assert opened.fingerprint == made.fingerprint
    assert text(opened, "train") == text(made, "train")


def test_a_missing_tokenizer_model_is_named(config: Config, tmp_path: Path):
    write(tmp_path, {"a.txt": LINES})
    with pytest.raises(UserError, match=r"no\.model: (unreadable|no such file)"):
        open_corpus(config, tmp_path / "a.txt", tokenizer="sentencepiece", tokenizer_path=str(tmp_path / "no.model"))


def test_compression_baselines_are_plausible_and_saved(config: Config, tmp_path: Path):
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=8, dtype=np.uint8)).decode() for _ in range(2000)]
    write(tmp_path, {"a.txt": " ".join(words) + "\n", "b.txt": " ".join(words[::-1]) + "\n"})
    corpus = open_corpus(config, tmp_path / "a.txt", val_path=str(tmp_path / "b.txt"))
    baselines = compression_baselines(corpus)
    assert 4.5 < baselines["unigram of bytes"] < 4.9  # log2(26) = 4.7 for letters, and a few spaces
    assert baselines["xz -9e after the training text"] < 0.8 * baselines["xz -9e"]  # the words are known
    assert baselines["xz -9e"] < 8 and baselines["gzip -9"] < 8
    assert corpus.folder and json.loads((corpus.folder / "baselines.json").read_text()) == baselines
    assert compression_baselines(prepare(config)) == baselines


def test_importing_the_data_package_loads_no_heavy_modules():
    heavy = ("tensorflow", "tensorflow_datasets", "sentencepiece", "jax")
    code = f"import sys, jaxlm.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_command_makes_a_store_and_reports_it(config: Config, tmp_path: Path):
    write(tmp_path, {"a.txt": LINES})
    command = [sys.executable, "tools/prepare_data.py", "--config", "configs/base.py", "--config.data.source=text",
               f"--config.data.path={tmp_path / 'a.txt'}", f"--config.data.cache_dir={config.data.cache_dir}",
               "--config.data.tokenizer=bytes"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["train"]["bytes"] + facts["val"]["bytes"] == len(LINES)
    assert facts["train_bytes_per_token"] == 1 and Path(facts["folder"]).is_dir()
    assert f"store {facts['folder']}" in done.stdout.splitlines() and facts["folders"] == [facts["folder"]]
    (tmp_path / "a.txt").unlink()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"jaxlm: data\.path is .*\n", done.stderr)


def test_the_command_names_all_stores_of_a_mixture_and_none_of_token_ids(
    config: Config, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, {"a/1.txt": LINES, "a/2.txt": LINES, "b/1.txt": LINES, "b/2.txt": LINES * 2})
    np.save(tmp_path / "ids.npy", np.arange(5000) % 50)
    keys = [f"--config.data.cache_dir={config.data.cache_dir}", "--config.data.tokenizer=bytes"]

    def call(*more: str) -> tuple[list[str], dict]:
        assert prepare_data.main(["--config", "configs/base.py", *keys, *more]) == 0
        out = capsys.readouterr().out.splitlines()
        return out[3:-1], json.loads(out[-1])

    mixture = f"--config.data.mixture=1 text {tmp_path / 'a'}; 1 text {tmp_path / 'b'}"
    said, mixed = call(mixture, "--config.seq_len=16")
    assert len(set(mixed["folders"])) == 2 and "folder" not in mixed
    assert said == [f"store {folder}" for folder in mixed["folders"]]
    said, facts = call("--config.data.source=tokens", f"--config.data.path={tmp_path / 'ids.npy'}")
    assert (
        said == [f"no store: data.path={tmp_path / 'ids.npy'} consists of token ids already"]
        and facts["folder"] is None
    )
    damaged = Path(mixed["folders"][1], "train/00000.bin")
    damaged.write_bytes(bytes(damaged.stat().st_size))
    monkeypatch.setattr(store_reader, "CHECKED_BYTES", 0)
    with pytest.raises(UserError, match="content does not match its manifest"):
        call(mixture, "--config.seq_len=16")


@pytest.mark.parametrize("num_bytes, size", [(999, "999 B"), (54_321, "54.3 kB"), (2_345_678, "2.3 MB")])
def test_sizes_of_small_corpora_are_not_zero(capsys, num_bytes: int, size: str):
    with track("tokenizing", num_bytes, show=True) as bar:
        bar.advance(num_bytes)
    assert re.fullmatch(rf"tokenizing {size}\ntokenizing: {size} in .* s\n", capsys.readouterr().err)

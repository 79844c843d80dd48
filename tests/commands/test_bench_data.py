"""`jaxlm bench data` reports all its numbers, and each means what its name says."""

import dataclasses
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.base import get_config
from jaxlm.commands import bench_data, bench_tokenizing
from jaxlm.config import Config
from jaxlm.data import prepare
from jaxlm.data import stream as stream_lib
from jaxlm.data.sources import files as files_lib
from jaxlm.host.exit_codes import exit_code
from tests.corpora import make_config

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
PREPARATION = {
    "documents",
    "bytes",
    "tokens",
    "processes",
    "peak_process_bytes",
    "seconds",
    "tokens_per_second",
    "mb_per_second",
    "library",
    "library_tokens",
    "library_mb_per_second",
    "over_library",
}
FEEDING = {"tf_tokens_per_second", "thread_tokens_per_second", "seek_ms", "tf_seek_ms", "thread_seek_ms"}
WAITING = {
    "compute_ms",
    "devices",
    "sleep_share",
    "sleep_step_ms",
    "computation_share",
    "computation_step_ms",
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("argparse.py", "ast.py", "cmd.py"):
        (folder / name).write_bytes((STDLIB / name).read_bytes())
    return folder


def check(result: dict[str, Any], texts: Path | None, tensorflow: bool, documents: bool, compute_ms: float) -> None:
    assert result.keys() == {"preparation", "feeding", "waiting"}
    preparation, feeding, waiting = result.values()
    if texts is None:
        assert preparation is None
    else:
        assert preparation.keys() == PREPARATION
        assert preparation["bytes"] == sum(path.stat().st_size for path in texts.iterdir())
        assert preparation["documents"] == len(list(texts.iterdir()))
        assert preparation["mb_per_second"] == pytest.approx(preparation["bytes"] / preparation["seconds"] / 1e6)
        assert preparation["tokens_per_second"] == pytest.approx(preparation["tokens"] / preparation["seconds"])
        assert preparation["peak_process_bytes"] > 20e6  # a child's peak starts at the size of its parent, here pytest
        assert preparation["processes"] == 1
    assert feeding.keys() == {"seq_len", "batch_size", "concat", "document"}
    assert (feeding["document"] is not None) == documents
    for found in filter(None, (feeding["concat"], feeding["document"])):
        assert found.keys() == FEEDING
        for name, value in found.items():
            if name.startswith("tf") and not tensorflow:
                assert value is None
            else:
                assert 1e4 < value < 1e10 if name.endswith("second") else 0 < value < 1e4, (name, value)
    assert waiting.keys() == WAITING
    assert waiting["compute_ms"] == compute_ms <= waiting["sleep_step_ms"]
    assert 0 < waiting["sleep_share"] < 1 and 0 < waiting["computation_share"] < 1


@pytest.mark.slow
def test_the_whole_command(texts: Path, tmp_path: Path):
    command = [
        sys.executable,
        ROOT / "tools/bench.py",
        "data",
        "--config",
        ROOT / "configs/base.py",
        "--rounds=1",
        "--steps=3",
        "--compute_ms=5",
        "--config.data.source=text",
        f"--config.data.path={texts}",
        "--config.data.vocab_size=400",
        "--config.seq_len=32",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2 and "training a tokenizer" in done.stderr
    assert "a corpus of 0.2 MB; below 100 MB" in done.stderr
    *lines, last = done.stdout.splitlines()
    starts = ["round 1/1", "preparation", "feeding · concat", "feeding · document", "waiting"]
    assert len(lines) == len(starts) and all(map(str.startswith, lines, starts)), lines
    result = json.loads(last)
    check(result, texts, tensorflow=True, documents=True, compute_ms=5)
    preparation = result["preparation"]
    assert preparation["library"] == "sentencepiece"
    # All except one bos per document.
    assert preparation["library_tokens"] == preparation["tokens"] - preparation["documents"]
    assert preparation["bytes"] / 4 < preparation["tokens"] < preparation["bytes"]
    assert 0.01 < preparation["over_library"] < 20 and 0.01 < preparation["library_mb_per_second"] < 1000
    assert {path.name for path in tmp_path.iterdir()} == {"texts"}  # temporary files are gone


@pytest.mark.parametrize("source", ["text", "synthetic"])
def test_without_tensorflow(
    source: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def absent() -> None:
        raise ImportError

    for module in (bench_data, stream_lib):
        monkeypatch.setattr(module, "import_tensorflow", absent)
    monkeypatch.setattr(bench_data, "FEED_SECONDS", 0.05)
    keys = [f"source={source}", "tokenizer=bytes", *([f"path={texts}"] if source == "text" else [])]
    argv = ["--config", "configs/debug.py", "--rounds=2", "--steps=3", "--compute_ms=2.5", "--config.seq_len=32"]
    monkeypatch.chdir(ROOT)
    assert bench_data.main([*argv, *(f"--config.data.{key}" for key in keys)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check(result, texts if source == "text" else None, False, documents=source == "text", compute_ms=2.5)
    if source == "text":
        preparation = result["preparation"]
        assert preparation["tokens"] == preparation["bytes"] + preparation["documents"]
        assert all(preparation[key] is None for key in PREPARATION if "library" in key)


def byte_level_bpe(text: str, path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library: Any = Tokenizer(models.BPE())  # Any, because the stubs have properties without setters
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train_from_iterator([text], trainer)
    library.save(str(path))


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "hf"])
def test_the_library_does_the_work_of_the_store(
    tokenizer: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the same texts and with as many processes, it returns as many tokens, except for one bos per document."""
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 60_000)
    monkeypatch.setattr(bench_tokenizing, "num_processes", lambda: 2)
    config = make_config(tmp_path)
    config.data = dataclasses.replace(config.data, **{"path": str(texts), "vocab_size": 400, "tokenizer": tokenizer})
    if tokenizer == "hf":
        config.data.tokenizer_path = str(tmp_path / "tokenizer.json")
        byte_level_bpe((texts / "cmd.py").read_text("utf-8"), tmp_path / "tokenizer.json")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    bench_tokenizing.save_tokenizer(config.data, folder)
    library = bench_tokenizing.library_of(folder)
    assert library is not None
    assert library == {"sentencepiece": "sentencepiece", "hf": "tokenizers"}[tokenizer]
    data = dataclasses.replace(config.data, tokenizer_path=str(folder))
    built, alone = bench_tokenizing.build_store(data, 16), bench_tokenizing.encode_alone(library, folder, data)
    assert built.processes == 2
    assert alone.tokens == built.tokens - built.documents > 1000
    assert 0 < alone.seconds < built.seconds  # only the store's time includes starting processes


def test_the_ratio_is_a_median_over_rounds(capsys: pytest.CaptureFixture[str]):
    builds = [
        bench_tokenizing.Built(seconds, 1, 1_000_000, 10, 2, peak) for seconds, peak in ((4.0, 7), (2.0, 9), (8.0, 8))
    ]
    alone = [bench_tokenizing.Encoded(1.0, 9)] * 3
    result = bench_tokenizing._preparation("tokenizers", builds, alone)
    assert result["seconds"] == 4 and result["over_library"] == 0.25 and result["peak_process_bytes"] == 9
    assert result["library_mb_per_second"] == 1 and result["mb_per_second"] == 0.25
    assert "ratio 0.25" in capsys.readouterr().out


class Slow:
    """A stream that takes `seconds` for each batch."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        return {"inputs": np.zeros((8, 1, 4), np.int32)}

    def settle(self) -> None:
        pass

    close = settle


@pytest.fixture
def synthetic() -> Config:
    config = get_config()
    config.data.source, config.data.vocab_size = "synthetic", 64
    config.batch_size, config.seq_len = 8, 4
    return config


@pytest.mark.parametrize("next_ms, share", [(0, 0), (15, 0.75)])
def test_waiting_is_the_time_of_taking_batches(
    next_ms: int, share: float, synthetic: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_data, "train_stream", lambda *a, **k: Slow(next_ms / 1e3))
    result = bench_data.measure_waiting(prepare(synthetic), synthetic, rounds=1, steps=20, compute_ms=5)
    assert result["sleep_share"] == pytest.approx(share, abs=0.2)
    assert next_ms + 5 <= result["sleep_step_ms"]


def test_feeding_is_the_tokens_of_whole_batches(synthetic: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_data, "train_stream", lambda *a, **k: Slow(0.01))
    monkeypatch.setattr(bench_data, "FEED_SECONDS", 0)
    rate = bench_data.feed(bench_data.TrainOrder(prepare(synthetic), synthetic), synthetic, "thread", 20)
    assert 8 * 4 / 0.01 / 3 < rate <= 8 * 4 / 0.01


def test_a_longer_synthetic_computation_takes_longer():
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("devices",)), PartitionSpec("devices"))
    took = {}
    for wanted in (0.02, 0.2):
        compute, times = bench_data._computation(sharding, wanted), []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(compute())
            times.append(time.perf_counter() - start)
        took[wanted] = min(times)
    assert took[0.2] > 0.05 and took[0.2] > 2 * took[0.02]


WRONG = {
    "--rounds=0": "1 or more",
    "--steps=-1": "1 or more",
    "--steps=many": "--steps",
    "--compute_ms=0": "more than 0",
    "--compute_ms=nan": "more than 0",
    "--compute_ms=1e9": "at most",
    "--warmup=3": "--warmup",
    "--config.batch_size=0": "batch_size is 0",
    "--config.data.path=nowhere": "no such file or folder",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_values_are_refused(argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    argv = ["--config", "configs/base.py", "--config.data.source=text", "--config.data.path=README.md", argument]
    try:
        code = exit_code(lambda: bench_data.main(argv))
    except SystemExit as stop:  # argparse exits
        code = stop.code
    assert code == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and WRONG[argument] in error and out == ""


def test_help():
    for argv, word in (([], "jaxlm bench data"), (["data"], "--compute_ms")):
        command = [sys.executable, ROOT / "tools/bench.py", *argv, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert word in shown.stdout and shown.stderr == ""

"""Corpora that are files of token ids, and synthetic token ids."""

import time
from pathlib import Path

import numpy as np
import pytest

from configs.base import get_config
from jaxlm.config import Config, UserError
from jaxlm.data import prepare
from jaxlm.data.tokenizers.base import ByteTokenizer
from tests.corpora import open_corpus


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = get_config()
    config.seq_len = 16
    config.data.source, config.data.vocab_size = "tokens", 50
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def test_token_files_are_read_and_split(config: Config, tmp_path: Path):
    ids = np.arange(1000) % 50
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", ids)
    corpora = [open_corpus(config, tmp_path / name) for name in ("a.bin", "a.npy")]
    for corpus in corpora:
        np.testing.assert_array_equal(corpus.train, ids[:950])
        np.testing.assert_array_equal(corpus.val, ids[950:])
        assert corpus.tokenizer is None and corpus.bytes_per_token is None and corpus.vocab_size == 50
    both = open_corpus(config, tmp_path / "a.bin", val_path=str(tmp_path / "a.npy"))
    assert len(both.train) == len(both.val) == 1000
    assert len({c.fingerprint for c in (corpora[0], both)}) == 2


def test_unusable_token_files_are_refused(config: Config, tmp_path: Path):
    np.array([1, 2, 50, 3] * 50, "<u2").tofile(tmp_path / "large.bin")
    np.save(tmp_path / "negative.npy", np.array([3, -1] * 50))
    np.save(tmp_path / "floats.npy", np.zeros(100))
    np.save(tmp_path / "matrix.npy", np.zeros((10, 10), int))
    for name, content in {"odd.bin": b"abc", "text.txt": b"x", "bad.npy": b"abc", "empty.bin": b""}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    cases = {
        "large.bin": r"large\.bin: id 50 at position 2; allowed: 0 to 49, the ids of",
        "negative.npy": r"negative\.npy: id -1 at position 1",
        "floats.npy": "float64",
        "matrix.npy": r"shape \(10, 10\)",
        "odd.bin": "3 bytes",
        "text.txt": r"a \.txt file; allowed",
        "nowhere.bin": "no such file",
        "bad.npy": "unreadable",
        "empty.bin": "nothing but empty files",
        "folder": "no files there",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_corpus(config, tmp_path / name)


@pytest.mark.parametrize("names", [("x_val_0.npy", "x_train_0.npy"), ("train/a.npy", "test/a.npy")])
@pytest.mark.parametrize("pattern", ["", "/**/*.npy"])
def test_training_on_validation_files_is_refused(config: Config, tmp_path: Path, names: tuple[str, str], pattern: str):
    """llm.c leaves training and validation files in one folder; the message says which paths to set instead."""
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "d" / name, (np.arange(1000) % 50).astype("<u2"))
    train, val = (str(tmp_path / "d" / name) for name in sorted(names, key=lambda name: "train" not in name))
    said = rf"holds .* and would train on both; allowed: data\.path={train} data\.val_path={val}, or globs$"
    with pytest.raises(UserError, match=said):
        open_corpus(config, f"{tmp_path / 'd'}{pattern}")
    assert len(open_corpus(config, train, val_path=val).val) == 1000


@pytest.mark.parametrize("vocab_size", [50, 50_000, 200_000])
def test_ids_of_32_bits_without_a_header_are_refused(config: Config, tmp_path: Path, vocab_size: int):
    ids = np.random.default_rng(0).integers(vocab_size, size=1000)
    ids.astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin: looks like 32-bit ids; allowed: .bin of uint16 without a header"):
        open_corpus(config, tmp_path / "a.bin", vocab_size=vocab_size)


def test_ids_of_16_bits_with_many_zeros_are_accepted(config: Config, tmp_path: Path):
    for ids in (np.zeros(1000), np.arange(1000) % 2 * 9, np.arange(1000) % 3):
        ids.astype("<u2").tofile(tmp_path / "a.bin")
        assert len(open_corpus(config, tmp_path / "a.bin").train) == 950


def test_synthetic_tokens_follow_their_rule_and_are_made_fast(config: Config):
    config.data.source, config.data.vocab_size = "synthetic", 97
    begin = time.monotonic()
    corpus = prepare(config)
    assert time.monotonic() - begin < 1
    x = np.asarray(corpus.train).astype(np.int64)
    noise = (x[1:] - 5 * x[:-1] - 1) % 97
    assert np.mean(noise < 4) > 0.999  # all but the seams of the chains
    assert np.abs(np.bincount(noise, minlength=97)[:4] / len(noise) - 0.25).max() < 0.01
    assert np.asarray(corpus.train).max() < 97 and len(corpus.val) == 1 << 15
    np.testing.assert_array_equal(corpus.train, prepare(config).train)
    config.seed = 1
    assert prepare(config).fingerprint != corpus.fingerprint


def test_files_of_llm_c_are_one_corpus(config: Config, tmp_path: Path):
    ids = np.arange(1000) % 50
    (tmp_path / "d").mkdir()
    for i, part in enumerate(np.split(ids, [300, 310, 700])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (tmp_path / f"d/{i}.bin").write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    for path in ("d", "d/*.bin"):
        corpus = open_corpus(config, tmp_path / path)
        np.testing.assert_array_equal(corpus.train, ids[:950])
        np.testing.assert_array_equal(corpus.val, ids[950:])
    starts = np.arange(930)
    np.testing.assert_array_equal(corpus.train.windows(starts, 17), (starts[:, None] + np.arange(17)) % 50)
    whole = (tmp_path / "d/0.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"short\.bin: version 1 with 299 tokens; allowed .*the 300 tokens"):
        open_corpus(config, tmp_path / "short.bin")


def test_documents_start_at_each_bos(config: Config, tmp_path: Path):
    ids = np.array([*range(5), 256, *range(9), 256, 256, *range(40)] * 4)
    np.save(tmp_path / "a.npy", ids)
    ByteTokenizer().save(tmp_path)
    corpus = open_corpus(config, tmp_path / "a.npy", tokenizer_path=str(tmp_path), vocab_size=257, val_fraction=0.25)
    assert corpus.train.starts is not None
    np.testing.assert_array_equal(corpus.train.starts, [0, *np.flatnonzero(np.asarray(corpus.train) == 256)])


def test_the_vocabulary_may_be_larger_than_the_tokenizer(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    np.save(tmp_path / "a.npy", np.arange(1000) % 257)
    ByteTokenizer().save(tmp_path)
    keys = {"tokenizer_path": str(tmp_path), "val_fraction": 0.25}
    for size, said in ((257, 0), (320, 1)):
        capsys.readouterr()
        open_corpus(config, tmp_path / "a.npy", vocab_size=size, **keys)
        assert prepare(config).vocab_size == 257
        assert capsys.readouterr().err.count("the tokenizer has 257 ids") == said
    with pytest.raises(UserError, match=r"data\.vocab_size is 256; allowed with the tokenizer .*: 257 or more"):
        open_corpus(config, tmp_path / "a.npy", vocab_size=256, **keys)


def test_validation_tokens_start_with_a_document(config: Config, tmp_path: Path):
    """Otherwise a document would be in both splits, and the last training targets would belong to another document."""
    ids = np.array([i for n in range(10) for i in (256, *range(n, n + 20))])
    np.save(tmp_path / "a.npy", ids)
    ByteTokenizer().save(tmp_path)
    corpus = open_corpus(config, tmp_path / "a.npy", tokenizer_path=str(tmp_path), vocab_size=257, val_fraction=0.25)
    assert len(corpus.train) == 8 * 21 and np.asarray(corpus.val)[0] == 256
    x, y = np.zeros((2, 20), np.int32)
    corpus.train.copy(8 * 21 - 20, x, y)
    assert y.tolist() == [*range(8, 27), 256]


def test_newer_files_of_llm_c_are_read(config: Config, tmp_path: Path):
    ids, header = np.arange(1000) * 100, np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 1000
    (tmp_path / "a.bin").write_bytes(header.tobytes() + ids.astype("<u4").tobytes())
    corpus = open_corpus(config, tmp_path / "a.bin", vocab_size=100_000)
    np.testing.assert_array_equal(corpus.train, ids[:950])

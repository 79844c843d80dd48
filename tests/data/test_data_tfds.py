"""tensorflow_datasets as a source, with datasets on the local disk and without a network."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.base import get_config
from jaxlm.config import Config, UserError
from jaxlm.data import prepare, store
from jaxlm.data.baselines import text_of
from jaxlm.data.sources import tfds as tfds_source
from jaxlm.data.sources.documents import Document, held_out
from jaxlm.data.sources.opening import open_source
from tests.corpora import documents

tfds = pytest.importorskip("tensorflow_datasets")

STORIES = [f"story {i}: être ou ne pas être\r\n" for i in range(60)]


class TinyStoriesOfTests(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")

    def _info(self) -> Any:
        features = {"body": tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples(STORIES[:50]), "test": self._generate_examples(STORIES[50:])}

    def _generate_examples(self, stories: list[str]) -> Any:
        for i, story in enumerate(stories):
            yield i, {"body": story, "number": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    TinyStoriesOfTests(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def config(tmp_path: Path, data_dir: Path) -> Config:
    config = get_config()
    config.seq_len = 16
    config.data.source, config.data.tokenizer = "tfds", "bytes"
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.tfds_name, config.data.path, config.data.text_key = "tiny_stories_of_tests", str(data_dir), "body"
    return config


def test_a_local_dataset_is_read_with_its_own_validation_split(config: Config):
    config.data.val_split = "test"
    corpus = prepare(config, progress=False)
    assert corpus.tokenizer
    train, val = (text_of(tokens, corpus.tokenizer).decode() for tokens in (corpus.train, corpus.val))
    assert sorted(train.splitlines(keepends=True)) == sorted(STORIES[:50])
    assert sorted(val.splitlines(keepends=True)) == sorted(STORIES[50:])
    assert corpus.facts["train"]["documents"] == 50
    assert prepare(config, progress=False).fingerprint == corpus.fingerprint


def test_two_small_splits_are_read_by_this_process(config: Config, monkeypatch: pytest.MonkeyPatch):
    """Other processes would first import TensorFlow, which takes ten times as long as all the rest."""
    config.data.val_split = "test"
    (unit,) = open_source(config.data).units()
    found = [d for d in unit.read() if isinstance(d, Document)]
    assert [d.split for d in found] == ["train"] * 50 + ["val"] * 10
    monkeypatch.setattr(tfds_source, "UNIT_EXAMPLES", 59)
    several = open_source(config.data).units()
    assert len(several) == 2 and [d for unit in several for d in unit.read()] == found


def test_documents_of_one_split_are_held_out(config: Config):
    config.data.val_fraction = 0.2
    source = open_source(config.data)
    train, val = (documents(source, split) for split in ("train", "val"))
    assert len(train) + len(val) == 50 and val
    assert all(held_out(d.name, 0.2) for d in val) and not any(held_out(d.name, 0.2) for d in train)
    assert documents(source, "val") == val
    config.data.split = "train[:50%]"
    half = open_source(config.data)
    assert half.key != source.key
    assert len(documents(half, "train")) + len(documents(half, "val")) == 25


def test_the_units_of_a_split_join_to_the_split(config: Config, monkeypatch: pytest.MonkeyPatch):
    """Processes read the units. Which example is held out does not depend on the number of units."""
    config.data.val_fraction = 0.2
    whole = prepare(config, progress=False)
    documents = [d for unit in open_source(config.data).units() for d in unit.read()]
    monkeypatch.setattr(tfds_source, "UNIT_EXAMPLES", 20)
    units = open_source(config.data).units()
    assert len(units) == 3 and len(documents) == 50
    assert [d for unit in units for d in unit.read()] == documents
    monkeypatch.setattr(store, "SHAPE", [1])  # so that another store is made
    parts = prepare(config, progress=False)
    assert len(parts.train.shards) == 3
    np.testing.assert_array_equal(parts.train, whole.train)


def test_array_record_gives_the_same_tokens(config: Config, tmp_path: Path):
    """array_record is the other format in which datasets are stored."""
    builder = TinyStoriesOfTests(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    assert list(tmp_path.rglob("*.array_record*"))
    expected = prepare(config, progress=False)
    config.data.path = str(tmp_path)
    corpus = prepare(config, progress=False)
    assert corpus.folder != expected.folder
    np.testing.assert_array_equal(corpus.train, expected.train)


@pytest.mark.parametrize("name", ["lm1b", "c4/en", "wikipedia/20230601.en", "wiki40b/en", "pg19", "tiny_shakespeare"])
def test_mock_data_of_common_datasets_is_read(config: Config, name: str):
    key = "book_text" if name == "pg19" else "text"
    config.data.tfds_name, config.data.path, config.data.text_key, config.data.val_fraction = name, "", key, 0.2
    with tfds.testing.mock_data(num_examples=60):
        corpus = prepare(config, progress=False)
    assert corpus.facts["train"]["documents"] + corpus.facts["val"]["documents"] == 60


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_key", "text", r"data\.text_key is 'text'; allowed with tiny_stories_of_tests: body, number"),
        ("text_key", "number", r"data\.text_key is 'number', which holds int"),
        ("split", "trian", r"data\.split is 'trian'; allowed with tiny_stories_of_tests/1\.2\.3: .*train"),
        ("val_split", "valid", r"data\.val_split is 'valid'; allowed with"),
        ("tfds_name", "no_such_dataset", r"data\.tfds_name is 'no_such_dataset': .*allowed: "),
        ("tfds_name", "a b:::", r"data\.tfds_name is 'a b:::'"),
    ],
)
def test_wrong_values_are_refused(config: Config, key: str, value: str, message: str):
    setattr(config.data, key, value)
    with pytest.raises(UserError, match=message) as error:
        prepare(config, progress=False)
    assert "\n" not in str(error.value)


def test_an_absent_dataset_without_a_network_is_refused(config: Config, tmp_path: Path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses connections
    monkeypatch.setattr(tfds_source, "STALL_SECONDS", 5)
    config.data.tfds_name, config.data.path = "tiny_shakespeare", str(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.tfds_name is 'tiny_shakespeare', which is not in .*download_and_prepare"
    ):
        prepare(config, progress=False)


def test_a_download_that_stalls_is_ended(config: Config, tmp_path: Path, monkeypatch):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(tfds_source.sys, "executable", str(sleeper))
    monkeypatch.setattr(tfds_source, "STALL_SECONDS", 1)
    config.data.tfds_name, config.data.path, begin = "tiny_shakespeare", str(tmp_path / "data"), time.monotonic()
    with pytest.raises(UserError, match="nothing arrived for 1 s"):
        prepare(config, progress=False)
    assert time.monotonic() - begin < 20


def test_a_builder_that_does_not_answer_is_reported(config: Config, monkeypatch):
    monkeypatch.setattr(tfds_source, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(tfds, "builder", lambda *a, **k: time.sleep(3))
    with pytest.raises(UserError, match=r"no answer in 0\.2 s"):
        prepare(config, progress=False)

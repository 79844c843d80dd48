"""Damaged configurations and command lines are read or refused in one line, and no secret is saved."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import Config, UserError, files, flatten, key_types
from jaxlm.config.overrides import apply_overrides
from jaxlm.config.validate import validate
from tests.configurations import BASE, refusal
from tests.corpora import write
from tests.fuzzing import changed, damaged, fuzz, fuzz_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return fuzz_config(tmp_path)


def test_damaged_saved_configurations_are_read_or_refused(tmp_path: Path):
    saved = {"config": dataclasses.asdict(get_config()), "versions": {}, "vocab_size": 5, "history": []}
    path = tmp_path / "config.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        validate(files.from_saved(files.read_saved(path)["config"], str(path))[0])

    fuzz(changed([saved]) | changed([saved]) | damaged([json.dumps(saved).encode()]), read, 250)


def test_random_overrides_are_read_or_refused(tmp_path: Path):
    base, keys = get_config(), list(key_types())
    before = flatten(base)
    key = st.sampled_from(keys) | st.sampled_from(keys) | st.text(max_size=8)
    words = [
        "1",
        "-1",
        "1e400",
        "nan",
        "0x10",
        "9" * 5000,
        "true",
        "None",
        "",
        "a=b",
        "\n",
        "s3://a:b@c/d",
        "[0]",
        "%s",
    ]
    value = st.text(max_size=8) | st.sampled_from(words) | st.integers().map(str) | st.floats().map(str)
    forms = ["--config.{}={}", "--config.{} {}", "--noconfig.{}", "--config.{}", "-config.{}={}", "--{}={}", "-{} {}",
             "--flagfile={}", "-flagfile {}", "-undefok={}", "{}={}", "--config={}", "-help", "--"]  # fmt: skip
    argument = st.builds(str.format, st.sampled_from(forms), key, value)
    argument |= st.sampled_from([f"--config.{key}={value}" for key, value in before.items()])

    def read(arguments: list[str]) -> None:
        found = apply_overrides(base, [word for a in arguments for word in a.split(" ", 1)])
        assert validate(found) is found and flatten(base) == before

    fuzz(st.lists(argument, min_size=1, max_size=3), read, 350)


def test_no_option_reads_a_file_of_options(tmp_path: Path):
    path = write(tmp_path, {"more": "--config.steps=7\n", "binary": bytes(range(256))})
    for name in ("more", "binary", "none"):
        for option in (f"-flagfile={path / name}", f"--flagfile={path / name}"):
            assert refusal(option) == f"{option.split('=')[0]}: unknown option; see --help"
    assert "unknown option" in refusal("-flagfile", str(path / "more"))
    assert "unknown option" in refusal("-undefok=nope", "-nope=1")
    assert "very long name" in refusal("-" + "9" * 5000)


# Secrets

WITH_SECRETS = [
    "s3://user:pa55word@bucket/x.jsonl",
    "s3://AKIA0:pa5/5word+x@bucket/*.jsonl",
    "https://user:pa55word@host/x.jsonl",
    "https://pa55word@host/x.jsonl",
    "https://host:8080/x.jsonl?download=1&token=pa55word",
    "https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Signature=pa55word",
    "https://account.blob.core.windows.net/x.jsonl?sv=1&sig=pa55word",
    "simplecache::s3://user:pa55word@bucket/x.jsonl",
]
WITHOUT = [
    "s3://bucket/a:b@c.jsonl",
    "https://host:8080/user@home/x.jsonl?version=2&author=me",
    "sftp://user@host:22/x.jsonl",
    "abfs://container@account.dfs.core.windows.net/x.jsonl",
    "github://owner:repository@main/x.jsonl",
    "hf://datasets/owner/name@~parquet/x.jsonl",
    "/folder/a:b@c.jsonl",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_addresses_with_secrets_are_refused(config: Config, address: str):
    """An address with a secret is refused, because config.json would keep it, and no message shows the secret."""
    keys = {
        "data.path": ["--config.data.source=jsonl", f"--config.data.path={address}"],
        "data.val_path": ["--config.data.source=jsonl", "--config.data.path=a", f"--config.data.val_path={address}"],
        "data.mixture": [f"--config.data.mixture=0.5 stdlib; 0.5 jsonl {address}"],
        "data.tokenizer_path": [f"--config.data.tokenizer_path={address}"],
        "checkpoint.resume": [f"--config.checkpoint.resume={address}"],
    }
    for key, overrides in keys.items():
        said = refusal(*overrides)
        assert said.startswith(f"{key} has an address with credentials in it") and "environment" in said
    for change in ({"path": address}, {"mixture": f"1 stdlib; 1 jsonl {address}"}, {"tokenizer_path": address}):
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, source="jsonl", **change))
        with pytest.raises(UserError, match="credentials come from the environment") as caught:
            validate(own)
        assert "pa5" not in str(caught.value)
    assert "pa5" not in "".join(refusal(*overrides) for overrides in keys.values())


@pytest.mark.parametrize("address", WITHOUT)
def test_addresses_without_secrets_are_accepted(address: str):
    config = files.load(BASE, ["--config.data.source=jsonl", f"--config.data.path={address}"])
    assert config.data.path == address
    files.load(BASE, [f"--config.data.mixture=1 jsonl {address}; 1 text user:name@host"])

"""Runs from scratch, exported: `transformers` has the same ids, and writes the same text as `jaxlm generate`."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from jaxlm.commands import export_hf, generate
from jaxlm.run.open_run import open_run
from tests.interop.test_own_tokenizers import TEXTS
from tests.runs import run
from tests.tokenizing import CODE

pytestmark = pytest.mark.peers

QWEN3 = {"model.activation": "swiglu", "model.key_offset": False}
LLAMA = QWEN3 | {"model.qk_norm": False}
GPT2 = LLAMA | {"model.activation": "gelu", "model.norm": "layernorm", "model.position": "learned",
                "model.use_bias": True, "model.tie_embeddings": True}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bpe": LLAMA | {"data.tokenizer": "sentencepiece", "data.vocab_size": 400, "model.vocab_multiple": 64},
    "unigram": QWEN3 | {"data.tokenizer": "sentencepiece", "data.sentencepiece": "unigram", "data.vocab_size": 400},
    "bytes": GPT2 | {"data.tokenizer": "bytes"},
    "chars": LLAMA | {"data.tokenizer": "chars"},
    "own model": {"data.tokenizer": "bytes", "model.vocab_multiple": 64},  # of no architecture of transformers
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_and_the_same_text(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = importlib.import_module("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "code.py").write_text(CODE)
    texts = {"data.source": "text", "data.path": tmp_path / "code.py", "data.cache_dir": tmp_path / "cache"}
    keys = {
        "steps": 150,
        "seq_len": 64,
        "model.d_model": 32,
        "optim.lr": 0.01,
        "eval.sample_tokens": 0,
        "eval.every_steps": 0,
    }
    assert run(tmp_path / "run", **texts, **keys, **KINDS[kind]) == 0
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    ours = open_run(tmp_path / "run", None).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert ours
    texts = [CODE] if kind == "chars" else TEXTS
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        found = theirs(text)["input_ids"]
        assert found == [ours.bos_id, *ids.tolist()]
        assert theirs.decode(found, skip_special_tokens=True) == text

    capsys.readouterr()
    argv = ["--workdir", str(tmp_path / "run"), "--prompt", "def ", "--temperature", "0", "--max_new_tokens", "30"]
    assert generate.main(argv) == 0
    said = capsys.readouterr().out
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), trust_remote_code=True)
    (found,) = pipeline("def ", max_new_tokens=30, do_sample=False)
    assert len(said) > 12 and found["generated_text"] == said.removesuffix("\n")

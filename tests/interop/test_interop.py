"""Exports and imports without transformers: the same parameters come back, and wrong files are refused by name."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.writing import write_params
from jaxlm.commands import export_hf, import_hf
from jaxlm.config import ModelConfig, UserError
from jaxlm.interop import own_model, shards
from jaxlm.interop.config_json import Reader
from jaxlm.interop.exporting import described, export_model
from jaxlm.interop.families import keys_of
from jaxlm.interop.importing import import_model
from jaxlm.model import make_model
from jaxlm.run.open_run import Run, open_run
from tests.decoders import BASE, drawn, with_
from tests.interop.own_models import OWN

ROWS = 13
Change = Callable[[dict[str, Any]], Any]
PLAIN: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2}
GEMMA: dict[str, Any] = PLAIN | {
    "activation": "geglu", "head_dim": 6, "post_norms": True, "scale_embeddings": True, "tie_embeddings": True,
    "score_dim": 9, "window": 5, "num_layers": 3,
}  # fmt: skip
LONGROPE: dict[str, Any] = {"rope_scaling": "longrope", "rope_original": 8, "rope_factor": 4.0, "rope_fraction": 0.75,
                            "head_dim": 8, "rope_short": "1.0 1.5 2.0", "rope_long": "2.0 4.0 8.0"}  # fmt: skip
MODELS: dict[str, tuple[str, ModelConfig]] = {
    "gpt2": ("gpt2", with_(position="learned", use_bias=True, tie_embeddings=True)),
    "llama3": ("llama", with_(**PLAIN, rope_scaling="llama3", rope_factor=8.0, rope_original=32, norm_eps=1e-5)),
    "mistral": ("mistral", with_(**PLAIN, window=4)),
    "qwen2": ("qwen2", with_(**PLAIN, qkv_bias=True, tie_embeddings=True)),
    "qwen3": ("qwen3", with_(**PLAIN, qk_norm=True, head_dim=6)),
    "gemma2": ("gemma2", with_(**GEMMA, global_every=2, attention_softcap=1.5, logit_softcap=2.0)),
    "gemma3": ("gemma3_text", with_(**GEMMA, global_every=3, qk_norm=True, rope_local_theta=7.0,
                                    rope_scaling="linear", rope_factor=8.0)),
    "phi4": ("phi3", with_(**PLAIN, **LONGROPE, tie_embeddings=True)),
    **{f"own {name}": ("jaxlm", c) for name, c in OWN.items()},
}  # fmt: skip


def make_run(folder: Path, c: ModelConfig) -> Run:
    """A workdir with random parameters, as open_run opens it."""
    config = dataclasses.replace(BASE, model=c, seq_len=32)
    params = drawn(make_model(c, ROWS, 32))
    with workdirs.Lock() as lock:
        workdirs.claim(folder, config, {"data_fingerprint": "", "vocab_size": ROWS}, None, lock)
    write_params(folder, params)
    return open_run(folder, None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("llama")
    run = make_run(folder / "run", with_(**PLAIN))
    export_model(run, folder / "hf")
    return run, folder / "hf"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_is_imported_again(name: str, tmp_path: Path) -> None:
    kind, c = MODELS[name]
    run = make_run(tmp_path / "run", c)
    export_model(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == kind
    import_model(tmp_path / "hf", tmp_path / "again")
    again = open_run(tmp_path / "again", None)
    assert described(again.config.model, 32) == described(c, 32)
    assert again.params.keys() == run.params.keys()
    want = own_model.used_rows(run.params, ROWS) if kind == "jaxlm" else run.params
    # Gemma's norms lose the rounding of 1 + (w - 1).
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-23), again.params, want)


def test_tensors_are_written_in_several_files_and_in_16_bits(llama: tuple[Run, Path], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    run, _ = llama
    monkeypatch.setattr(shards.write, "__defaults__", (3000,))
    export_model(run, tmp_path / "hf", "bfloat16")
    index = json.loads((tmp_path / "hf" / shards.INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert all(sum(x.nbytes for x in load_file(tmp_path / "hf" / name).values()) <= 3000 for name in files)
    import_model(tmp_path / "hf", tmp_path / "run")
    again = open_run(tmp_path / "run", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-8), again.params, run.params)
    import_model(tmp_path / "hf", tmp_path / "half", dtype="bfloat16")
    half = open_run(tmp_path / "half", None)
    assert half.config.model.param_dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), half.params, again.params)


def test_a_model_of_no_family_brings_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = with_(norm="rmsnorm", activation="relu2", key_offset=True, vocab_multiple=8, lora_rank=2)
    make_run(tmp_path / "run", c)
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    nearest = "the nearest is LlamaForCausalLM; allowed, to be set before training: model.activation=swiglu instead of"
    assert f"no architecture of transformers has this model; {nearest} relu2, model.key_offset=False" in said
    assert "modeling_jaxlm.py beside the weights computes it: load it with trust_remote_code=True" in said
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "generation_config.json", shards.FILE, "modeling_jaxlm.py"}
    classes = {node.name for node in ast.parse((tmp_path / "hf/modeling_jaxlm.py").read_text()).body
               if isinstance(node, ast.ClassDef)}  # fmt: skip
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    assert {name.removeprefix("modeling_jaxlm.") for name in hf["auto_map"].values()} <= classes
    tensors = load_file(tmp_path / "hf" / shards.FILE)
    assert hf["vocab_size"] == ROWS and tensors["lm_head.weight"].shape == (ROWS, 16)  # no rows without a token
    assert not [name for name in tensors if "lora" in name]
    with pytest.raises(UserError, match=f"--adapter: no architecture of transformers has this model; {nearest}"):
        export_hf.main([str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])
    assert not (tmp_path / "adapter").exists()


def test_own_models_have_every_key_and_choice() -> None:
    """So that modeling_jaxlm.py is compared with jaxlm for a new one, too."""
    sizes = {"num_layers", "d_model", "num_heads", "d_ff", "rope_theta"}  # shared by all models here
    for field in dataclasses.fields(ModelConfig):
        found = {getattr(c, field.name) for c in OWN.values()}
        if field.name not in (*own_model.FREE, *sizes):
            assert len(found) > 1 and found >= set(get_args(field.type)), field.name


OWN_KEYS: list[tuple[Change, str]] = [
    (lambda c: c["model"].pop("activation"), r"config\.json: lacks the key model\.activation"),
    (lambda c: c["model"].update(size=3), r"config\.json: has the key model\.size; allowed"),
    (lambda c: c["model"].update(norm="batchnorm"), r"model\.norm is 'batchnorm'; allowed: one of layernorm, rmsnorm"),
    (lambda c: c.update(model=[]), r"config\.json: model is \[\]; allowed: an object of keys"),
]


@pytest.mark.parametrize("change, said", OWN_KEYS, ids=[said[:30] for _, said in OWN_KEYS])
def test_wrong_keys_of_an_own_model_are_refused(change: Change, said: str, tmp_path: Path) -> None:
    export_model(make_run(tmp_path / "run", OWN["base"]), tmp_path / "hf")
    content = json.loads((tmp_path / "hf/config.json").read_text())
    change(content)
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        import_model(tmp_path / "hf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


WRONG_CONFIGS: list[tuple[Change, str]] = [
    (lambda c: c.update(model_type="bert"), r"model_type is 'bert'; allowed: 'gpt2', 'llama'"),
    (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu'; allowed: 'silu'"),
    (lambda c: c.pop("hidden_size"), "hidden_size is None; allowed: a number"),
    (lambda c: c.update(attention_bias=True), "attention_bias is True"),
    (lambda c: c.update(rope_scaling={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    (lambda c: c.update(intermediate_size=24), r"is \(16, 20\); allowed: \(16, 24\)"),
    (lambda c: c.update(num_hidden_layers=3), r"lacks the tensor model\.layers\.2\..* and \d+ more"),
    (lambda c: c.update(num_hidden_layers=1), r"has the tensor model\.layers\.1\."),
    (lambda c: c.update(tie_word_embeddings=False, vocab_size=14), r"is \(13, 16\); allowed: \(14, 16\)"),
]


@pytest.mark.parametrize("change, said", WRONG_CONFIGS, ids=[said[:20] for _, said in WRONG_CONFIGS])
def test_a_wrong_config_is_refused(change: Change, said: str, llama: tuple[Run, Path], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for path in llama[1].iterdir():
        (source / path.name).symlink_to(path)
    content = json.loads((source / "config.json").read_text())
    change(content)
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        import_model(source, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # nothing half written


OLDER_PHI: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0]}},
    {"rope_scaling": {"type": "su", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2, 4, 8]}},
]


@pytest.mark.parametrize("change", OLDER_PHI, ids=["longrope", "su"])
def test_configs_as_older_versions_wrote_them(change: dict[str, Any]) -> None:
    """The first context beside rope_scaling, not in it, and older names."""
    c = MODELS["phi4"][1]
    hf = described(c, 32)[1] | change
    assert "original_max_position_embeddings" in hf
    _, keys = keys_of(Reader(hf, "config.json"))
    found = dataclasses.replace(c, **{k.removeprefix("model."): v for k, v in keys.items() if k.startswith("model.")})
    assert described(found, 32) == described(c, 32)


WRONG_ROPE: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; allowed: an object"),
    ({"rope_scaling": {"type": "longrope", "short_factor": "1", "long_factor": [1]}}, "short_factor is '1'; allowed"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is None; allowed: a number"),
    ({"num_hidden_layers": 2.5}, "model.num_layers is 2.5; allowed: a whole number"),
    ({"head_dim": "8"}, "model.head_dim is '8'; allowed"),
]


@pytest.mark.parametrize("change, said", WRONG_ROPE, ids=[said[:20] for _, said in WRONG_ROPE])
def test_values_of_a_wrong_kind_are_refused(
    change: dict[str, Any], said: str, llama: tuple[Run, Path], tmp_path: Path
) -> None:
    content = json.loads((llama[1] / "config.json").read_text()) | {"model_type": "phi3"} | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / shards.FILE).symlink_to(llama[1] / shards.FILE)
    with pytest.raises(UserError, match=re.escape(said)):
        import_model(tmp_path, tmp_path / "run")


def test_wrong_tensors_are_refused(llama: tuple[Run, Path], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes((llama[1] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        import_model(source, tmp_path / "run")
    (source / shards.FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable"):
        import_model(source, tmp_path / "run")
    whole = load_file(llama[1] / shards.FILE)
    save_file(whole | {"model.rotary_emb.inv_freq": np.ones(2, np.float32)}, source / shards.FILE)
    import_model(source, tmp_path / "run")  # older files have it
    save_file(whole | {"model.extra": np.ones(2, np.float32)}, source / shards.FILE)
    with pytest.raises(UserError, match=r"has the tensor model\.extra; allowed"):
        import_model(source, tmp_path / "again")


def test_commands(llama: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_hf.main([str(llama[1]), str(tmp_path / "run"), "--seq_len", "16"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["vocab_size"] == ROWS and facts["parameters"] == sum(x.size for x in jax.tree.leaves(llama[0].params))
    assert open_run(tmp_path / "run", None).config.seq_len == 16
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--step", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["architecture"] == "LlamaForCausalLM"
    with pytest.raises(UserError, match="which is there already; allowed: a new or empty folder"):
        export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    with pytest.raises(UserError, match=r"WORKDIR is .*which is there already"):
        import_hf.main([str(llama[1]), str(tmp_path / "run")])
    with pytest.raises(UserError, match="--seq_len is 33; allowed: 1 to 32"):
        import_hf.main([str(llama[1]), str(tmp_path / "other"), "--seq_len", "33"])

"""LoRA beside `peft`: the same logits with an exported adapter and after merging, and the same training."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.writing import write_params
from jaxlm.config import Config
from jaxlm.config.files import load
from jaxlm.interop.adapters import export_adapter
from jaxlm.interop.exporting import export_model
from jaxlm.interop.importing import import_model
from jaxlm.model import lora, make_model
from jaxlm.run.open_run import Run, open_run
from jaxlm.train import step as train_step
from jaxlm.train import trained
from jaxlm.train.placement import Placement
from tests.interop.test_transformers import LENGTH, ROWS, make, ours, peers, theirs, tokens
from tests.runs import CONFIG

# peft asks transformers for things by their older names.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

ALL = "query|key|value|out|up|gate|down"
CASES = {"llama 3": ALL, "gpt2": "query|value|down", "phi3": "key|gate|out", "gemma2": "value|up"}


def with_lora(base: Run, folder: Path, targets: str, seed: int, **keys: Any) -> Run:
    """A run that has LoRA beside the weights of another one, with matrices that are not zero."""
    model = dataclasses.replace(base.config.model, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    config = dataclasses.replace(base.config, model=model, **keys)
    config.checkpoint.resume = str(base.folder)
    fresh = make_model(model, base.vocab_size, config.seq_len).init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), trained.part(config, fresh))
    with workdirs.Lock() as lock:
        workdirs.claim(folder, config, {"data_fingerprint": "", "vocab_size": base.vocab_size}, None, lock)
    write_params(folder, trained.joined(base.params, own))
    return open_run(folder, None)


@pytest.mark.parametrize("name", CASES)
def test_adapters_and_merged_models_have_the_same_logits(name: str, tmp_path: Path) -> None:
    _, transformers = peers()
    peft = importlib.import_module("peft")
    make(name).save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "base")
    base = open_run(tmp_path / "base", None)
    run = with_lora(base, tmp_path / "run", CASES[name], seed=1)
    want, before = ours(run, tokens()), ours(base, tokens())
    assert np.abs(want - before).max() > 0.1
    atol = 1e-4 * max(1, np.abs(want).max() / 10)

    export_adapter(run, tmp_path / "adapter", base="hf")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(original, tmp_path / "adapter").eval()
    np.testing.assert_allclose(theirs(adapted, tokens()), want, rtol=0, atol=atol)

    architecture = export_model(run, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert type(merged).__name__ == type(original).__name__ == architecture
    np.testing.assert_allclose(theirs(merged, tokens()), want, rtol=0, atol=atol)


STEPS, RATE, DECAY, EPS = 6, 0.02, 0.1, 1e-4


def test_training_is_the_same(tmp_path: Path) -> None:
    """AdamW on LoRA of all layers, from the same matrices, on the same batches."""
    torch, transformers = peers()
    peft = importlib.import_module("peft")
    make("llama 3").save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "base")
    run = with_lora(open_run(tmp_path / "base", None), tmp_path / "run", ALL, seed=2)
    export_adapter(run, tmp_path / "adapter")
    batches = [np.random.default_rng(seed).integers(0, ROWS, (4, LENGTH + 1)) for seed in range(STEPS)]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    own = [p for p in model.parameters() if p.requires_grad]
    assert len(own) == 2 * 7 * 4
    optimizer = torch.optim.AdamW(own, lr=RATE, betas=(0.9, 0.99), eps=EPS, weight_decay=DECAY)
    want = []
    for batch in batches:
        x = torch.tensor(batch)
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(loss.item())

    got, params = follow(run, batches)
    assert want[-1] != pytest.approx(want[0], rel=1e-2)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    a = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.detach().numpy().T
    np.testing.assert_allclose(params["layers"]["mlp"]["up"][lora.A][1], a, rtol=0, atol=1e-3 * np.abs(a).max())


def follow(run: Run, batches: list[np.ndarray]) -> tuple[list[float], Any]:
    """The losses of jaxlm's steps on two devices, and the parameters after them."""
    keys = ["optim.name=adamw", f"optim.lr={RATE}", "optim.schedule=constant", "optim.warmup_steps=0",
            "optim.b1=0.9", "optim.b2=0.99", f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", "optim.clip_norm=0",
            "batch_size=4", "optim.accum_steps=2"]  # fmt: skip
    config: Config = dataclasses.replace(load(CONFIG, [f"--config.{k}" for k in keys]), model=run.config.model)
    config.model.scan_unroll, config.seq_len = 1, run.config.seq_len
    model, devices = make_model(config.model, run.vocab_size, config.seq_len), jax.devices()[:2]
    state = train_step.init_whole(config, run.params)._replace(sync=train_step.init_sync(config, model, 2))
    state = Placement(config, model, devices).place(state)
    step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, devices), devices)
    losses = []
    for batch in batches:
        rows = batch.astype(np.int32).reshape(2, 2, -1)
        state, metrics = step(state, {"inputs": rows[..., :-1], "targets": rows[..., 1:]})
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)

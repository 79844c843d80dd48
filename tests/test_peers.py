"""Compares jaxlm with plain PyTorch decoders of GPT-2 and Llama: the same weights must give the same numbers.

Run `python -m pytest -m peers` with the `peers` extra installed.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.commands import bench_peers
from jaxlm.config import Config, UserError, files
from jaxlm.model import make_model, num_params
from jaxlm.train import guard
from jaxlm.train import step as train_step
from tests.decoders import logits_of, with_

torch: Any = pytest.importorskip("torch")
F: Any = torch.nn.functional
pytestmark = pytest.mark.peers

VOCAB, SEQ, BATCH, LAYERS, D, HEADS = 29, 12, 4, 2, 16, 4


def config(kind: str) -> Config:
    """Returns the configuration of `gpt` (with biases), `gpt_no_bias`, or `llama` (two key/value heads)."""
    c = files.load(Path(__file__).resolve().parents[1] / "configs" / "base.py")
    llama = kind == "llama"
    c.seed, c.steps, c.batch_size, c.seq_len = 0, 10, BATCH, SEQ
    c.model = with_(
        num_layers=LAYERS,
        d_model=D,
        num_heads=HEADS,
        num_kv_heads=2 if llama else 0,
        d_ff=40 if llama else 0,
        activation="swiglu" if llama else "gelu",
        norm="rmsnorm" if llama else "layernorm",
        position="rope" if llama else "learned",
        rope_theta=500.0,
        use_bias=kind == "gpt",
        tie_embeddings=not llama,
    )
    c.loss = dataclasses.replace(c.loss, label_smoothing=0.0, z_loss=0.0, chunk=0)
    # A larger eps than usual. Otherwise gradients that are 0 except for rounding (of key biases) would become +-lr.
    c.optim = dataclasses.replace(
        c.optim,
        name="adamw",
        lr=1e-2,
        schedule="cosine",
        warmup_steps=2,
        min_lr_ratio=0.1,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        clip_norm=0.5,
        accum_steps=1,
        ema_decay=0.0,
    )
    return c


class GPT(torch.nn.Module):
    """GPT-2 (Radford et al.), with its tanh approximation of GELU."""

    def __init__(self, bias: bool) -> None:
        super().__init__()

        def block() -> Any:
            return torch.nn.ModuleDict(
                {
                    "ln_1": torch.nn.LayerNorm(D, bias=bias),
                    "qkv": torch.nn.Linear(D, 3 * D, bias=bias),
                    "proj": torch.nn.Linear(D, D, bias=bias),
                    "ln_2": torch.nn.LayerNorm(D, bias=bias),
                    "fc": torch.nn.Linear(D, 4 * D, bias=bias),
                    "fc_out": torch.nn.Linear(4 * D, D, bias=bias),
                }
            )

        self.wte, self.wpe = torch.nn.Embedding(VOCAB, D), torch.nn.Embedding(SEQ, D)
        self.blocks = torch.nn.ModuleList([block() for _ in range(LAYERS)])
        self.ln_f = torch.nn.LayerNorm(D, bias=bias)

    def forward(self, tokens: Any) -> Any:
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe(torch.arange(T))
        for b in self.blocks:
            q, k, v = (y.view(B, T, HEADS, D // HEADS).transpose(1, 2) for y in b["qkv"](b["ln_1"](x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["proj"](y.transpose(1, 2).reshape(B, T, D))
            x = x + b["fc_out"](F.gelu(b["fc"](b["ln_2"](x)), approximate="tanh"))
        return self.ln_f(x) @ self.wte.weight.T

    def take(self, p: Any) -> None:
        put(self.wte, p["embed"])
        put(self.wpe, p["positions"])
        put(self.ln_f, p["final_norm"])
        for i, b in enumerate(self.blocks):
            layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
            a, m = layer["attention"], layer["mlp"]
            put(b["ln_1"], layer["attention_norm"])
            put(b["ln_2"], layer["mlp_norm"])
            put(b["qkv"], jax.tree.map(lambda *x: np.concatenate(x, -1), a["query"], a["key"], a["value"]))
            put(b["proj"], a["out"])
            put(b["fc"], m["up"])
            put(b["fc_out"], m["down"])

    def give(self, what: str) -> Any:
        """Returns weights (`data`) or gradients (`grad`) as jaxlm's tree."""
        layers = []
        for b in self.blocks:
            qkv = get(b["qkv"], what)
            parts = [{k: x[..., i * D : (i + 1) * D] for k, x in qkv.items()} for i in range(3)]
            layers.append(
                {
                    "attention": dict(zip(("query", "key", "value"), parts, strict=True))
                    | {"out": get(b["proj"], what)},
                    "attention_norm": get(b["ln_1"], what),
                    "mlp": {"up": get(b["fc"], what), "down": get(b["fc_out"], what)},
                    "mlp_norm": get(b["ln_2"], what),
                }
            )
        return {
            "embed": get(self.wte, what),
            "positions": get(self.wpe, what),
            "layers": jax.tree.map(lambda *x: np.stack(x), *layers),
            "final_norm": get(self.ln_f, what),
        }


class Llama(torch.nn.Module):
    """Llama 2 (Touvron et al.) as in Hugging Face's code: rotate-half, grouped-query attention, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        kv = 2 * D // HEADS
        sizes = {"q": (D, D), "k": (D, kv), "v": (D, kv), "o": (D, D), "up": (D, 40), "gate": (D, 40), "down": (40, D)}

        def block() -> Any:
            parts = {name: torch.nn.Linear(i, o, bias=False) for name, (i, o) in sizes.items()}
            return torch.nn.ModuleDict(parts | {n: torch.nn.RMSNorm(D, eps=1e-6) for n in ("norm_1", "norm_2")})

        self.embed, self.norm = torch.nn.Embedding(VOCAB, D), torch.nn.RMSNorm(D, eps=1e-6)
        self.blocks = torch.nn.ModuleList([block() for _ in range(LAYERS)])
        self.lm_head = torch.nn.Linear(D, VOCAB, bias=False)

    def forward(self, tokens: Any) -> Any:
        B, T = tokens.shape
        C = D // HEADS
        angles = torch.outer(torch.arange(T).float(), 500.0 ** (-torch.arange(0, C, 2).float() / C))
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

        def rotated(x: Any) -> Any:
            return x * cos + torch.cat([-x[..., C // 2 :], x[..., : C // 2]], dim=-1) * sin

        x = self.embed(tokens)
        for b in self.blocks:
            h = b["norm_1"](x)
            q, k, v = (b[n](h).view(B, T, -1, C).transpose(1, 2) for n in "qkv")
            q, k = rotated(q), rotated(k)
            k, v = (y.repeat_interleave(HEADS // 2, dim=1) for y in (k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(C)).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            x = x + b["o"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))
            h = b["norm_2"](x)
            x = x + b["down"](F.silu(b["gate"](h)) * b["up"](h))
        return self.lm_head(self.norm(x))

    NAMES = (
        ("q", ("attention", "query")),
        ("k", ("attention", "key")),
        ("v", ("attention", "value")),
        ("o", ("attention", "out")),
        ("up", ("mlp", "up")),
        ("gate", ("mlp", "gate")),
        ("down", ("mlp", "down")),
    )

    def take(self, p: Any) -> None:
        put(self.embed, p["embed"])
        put(self.norm, p["final_norm"])
        put(self.lm_head, p["head"])
        for i, b in enumerate(self.blocks):
            layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
            put(b["norm_1"], layer["attention_norm"])
            put(b["norm_2"], layer["mlp_norm"])
            for name, (part, theirs) in self.NAMES:
                put(b[name], layer[part][theirs])

    def give(self, what: str) -> Any:
        layers = []
        for b in self.blocks:
            layer: Any = {"attention_norm": get(b["norm_1"], what), "mlp_norm": get(b["norm_2"], what)}
            for name, (part, theirs) in self.NAMES:
                layer.setdefault(part, {})[theirs] = get(b[name], what)
            layers.append(layer)
        return {
            "embed": get(self.embed, what),
            "layers": jax.tree.map(lambda *x: np.stack(x), *layers),
            "final_norm": get(self.norm, what),
            "head": get(self.lm_head, what),
        }


def put(module: Any, p: Any) -> None:
    """Copies jaxlm's weights of a layer into a PyTorch module. PyTorch's linear layers are `[out, in]`."""
    with torch.no_grad():
        for name, x in p.items():
            parameter = module.bias if name == "bias" else module.weight
            parameter.copy_(torch.from_numpy(np.array(x).T if name == "kernel" else np.array(x)))


def get(module: Any, what: str) -> dict[str, np.ndarray]:
    """The inverse of `put`: returns weights (`data`) or gradients (`grad`)."""
    names = {torch.nn.Linear: "kernel", torch.nn.Embedding: "embedding"}
    out = {}
    for name, parameter in module.named_parameters():
        x = getattr(parameter, what).detach().numpy().copy()
        key = "bias" if name == "bias" else names.get(type(module), "scale")
        out[key] = x.T if key == "kernel" else x
    return out


def batches(n: int) -> list[dict[str, np.ndarray]]:
    """Draws batches with missing targets, more on the first device than on the second."""
    rng = np.random.default_rng(1)
    out = []
    for _ in range(n):
        tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
        there = rng.random((BATCH, SEQ)) < np.array([0.3, 0.5, 1.0, 0.9])[:, None]
        out.append({"inputs": tokens[:, :-1], "targets": np.where(there, tokens[:, 1:], -1)})
    return out


def torch_loss(peer: Any, batch: dict[str, np.ndarray]) -> Any:
    logits = peer(torch.from_numpy(batch["inputs"]).long()).flatten(0, 1)
    return F.cross_entropy(logits, torch.from_numpy(batch["targets"]).long().flatten(), ignore_index=-1)


def same_start(kind: str) -> tuple[Config, Any, Any, Any]:
    """Returns the configuration, jaxlm's model, random parameters, and a peer with the same parameters."""
    c = config(kind)
    model = make_model(c.model, VOCAB, SEQ)
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        return np.asarray(0.3 * rng.standard_normal(x.shape) + (path[-1].key == "scale"), np.float32)

    params = jax.tree_util.tree_map_with_path(draw, model.shapes())
    peer = Llama() if kind == "llama" else GPT(bias=kind == "gpt")
    peer.take(params)
    assert jax.tree.structure(peer.give("data")) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, peer.give("data"), params)  # each weight came back to its place
    return c, model, params, peer


def assert_close(got: Any, expected: Any, atol: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


KINDS = ["gpt", "gpt_no_bias", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients(kind: str) -> None:
    _, model, params, peer = same_start(kind)
    (batch,) = batches(1)

    def loss(p: Any) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(model)(p, batch["inputs"])
        nll = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["targets"], VOCAB), axis=-1)
        return jnp.sum(nll) / (batch["targets"] >= 0).sum(), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = torch_loss(peer, batch)
    expected.backward()
    expected_logits = peer(torch.from_numpy(batch["inputs"]).long()).detach().numpy()
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5 * np.abs(expected_logits).max())
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    expected_grads = peer.give("grad")
    assert_close(grads, expected_grads, 1e-5 * max(np.abs(g).max() for g in jax.tree.leaves(expected_grads)))


@pytest.mark.parametrize("kind", KINDS)
def test_three_adamw_steps_on_two_devices(kind: str) -> None:
    """Compares losses, gradient norms, rates and weights of jaxlm's step with PyTorch's AdamW on the whole batch."""
    c, model, start, peer = same_start(kind)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in peer.parameters() if p.dim() >= 2], "weight_decay": c.optim.weight_decay},
            {"params": [p for p in peer.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(c.optim.b1, c.optim.b2),
        eps=c.optim.eps,
    )
    devices = jax.devices()[:2]
    step = train_step.pmap_train_step(c, train_step.make_train_step(c, model, devices), devices)
    shapes = jax.eval_shape(lambda: train_step.init_state(c, model, 2))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(params=start, guard=guard.init())
    clipped = 0
    for n, batch in enumerate(batches(3)):
        lr = c.optim.lr * ((n + 1) / 2 if n < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (n - 2) / 8)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = torch_loss(peer, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), c.optim.clip_norm)
        optimizer.step()
        clipped += norm.item() > c.optim.clip_norm

        state, metrics = step(state, jax.tree.map(lambda x: x.reshape(2, BATCH // 2, SEQ), batch))
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=2e-5)
        np.testing.assert_allclose(metrics["lr"], lr, rtol=1e-6)
    assert clipped and state.step == 3
    # Each step moves a weight by up to lr = 0.01. Adam divides gradients by their size, which scales up their rounding.
    assert_close(state.params, peer.give("data"), 2e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(start), strict=True):
        name = jax.tree_util.keystr(path)
        # Without rotation, a bias of keys adds the same to all scores of a query, so it changes nothing.
        assert (np.abs(a - b).max() > 1e-2) == ("['key']['bias']" not in name), name


@pytest.mark.parametrize("kind", ["gpt", "gpt_no_bias", "llama"])
def test_the_model_that_bench_times_beside_ours_has_as_many_parameters(kind: str):
    """Its script, as `jaxlm bench --torch` starts it, makes steps of a model with as many parameters."""
    c = config(kind)
    parameters = num_params(make_model(c.model, VOCAB, SEQ).shapes())
    peer = bench_peers.pytorch(sys.executable, c, VOCAB, parameters)
    assert peer.step(2) > 0 and peer.peak_bytes > 1e8
    peer.close()
    with pytest.raises(UserError, match=r"parameters, not 1 as in JAX"):
        bench_peers.pytorch(sys.executable, c, VOCAB, 1)

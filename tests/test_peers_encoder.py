"""Compares encoder and decoder with `torch.nn.Transformer`: the same weights must give the same numbers.

Run `python -m pytest -m peers` with the `peers` extra installed.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import Config, files
from jaxlm.model import make_model
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from tests.decoders import with_

torch: Any = pytest.importorskip("torch")
F: Any = torch.nn.functional
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]

VOCAB, S, T, BATCH, D, HEADS, LAYERS, ENCODER = 29, 14, 10, 4, 16, 4, 2, 3
ATTENTION = ("query", "key", "value")


def config(zero: int) -> Config:
    c = files.load(Path(__file__).resolve().parents[1] / "configs" / "seq2seq.py")
    c.seed, c.steps, c.batch_size, c.seq_len = 0, 10, BATCH, T
    sizes = {"num_layers": LAYERS, "encoder_layers": ENCODER, "encoder_len": S, "d_model": D, "num_heads": HEADS}
    c.model = with_(
        **sizes,
        d_ff=40,
        activation="relu",
        position="sinusoidal",
        use_bias=True,
        tie_embeddings=True,
        scale_embeddings=True,
        remat="elementwise",
    )
    c.optim.name, c.optim.lr, c.optim.eps, c.optim.weight_decay = "adamw", 1e-2, 1e-5, 0.1
    c.optim.b1, c.optim.b2, c.optim.clip_norm = 0.9, 0.95, 0.5
    c.optim.schedule, c.optim.warmup_steps = "constant", 0
    c.parallel.zero = zero
    return c


class Peer(torch.nn.Module):
    """PyTorch's Transformer (Vaswani et al.) with norms before each part, and with one table for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, D)
        self.both = torch.nn.Transformer(
            D, HEADS, ENCODER, LAYERS, 40, dropout=0.0, activation="relu", batch_first=True, norm_first=True
        )

    def forward(self, batch: dict[str, np.ndarray]) -> Any:
        answers, prompts = (np.cumsum(batch[name] == 0, axis=1) for name in ("positions", "prompt_positions"))
        # True = not seen. Padding behind the answers sees the last prompt, as in jaxlm; nothing depends on it.
        of_prompts = prompts[:, :, None] != prompts[:, None]
        of_answers = (answers[:, :, None] != answers[:, None]) | np.triu(np.ones((T, T), bool), 1)
        cross = np.minimum(answers, prompts[:, -1:])[:, :, None] != prompts[:, None]
        masks = [torch.from_numpy(np.repeat(mask, HEADS, axis=0)) for mask in (of_prompts, of_answers, cross)]
        x = self.both(
            self.embedded(batch["prompts"], batch["prompt_positions"]),
            self.embedded(batch["inputs"], batch["positions"]),
            src_mask=masks[0],
            tgt_mask=masks[1],
            memory_mask=masks[2],
        )
        return x @ self.embed.weight.T

    def embedded(self, tokens: np.ndarray, positions: np.ndarray) -> Any:
        angles = torch.from_numpy(positions)[..., None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
        positions_ = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).float()
        return self.embed(torch.from_numpy(tokens).long()) * math.sqrt(D) + positions_

    def places(self) -> list[tuple[Any, tuple[str, ...], int | None]]:
        """Each of PyTorch's layers with the path of its parameters in jaxlm, and its number."""

        def of(layer: Any, stack: str, i: int) -> list[Any]:
            parts = {"attention": layer.self_attn, "attention_norm": layer.norm1}
            if stack == "layers":
                parts |= {"cross": layer.multihead_attn, "cross_norm": layer.norm2, "mlp_norm": layer.norm3}
            else:
                parts["mlp_norm"] = layer.norm2
            found = [(part, (stack, name), i) for name, part in parts.items()]
            return [*found, (layer.linear1, (stack, "mlp", "up"), i), (layer.linear2, (stack, "mlp", "down"), i)]

        stacks = {"layers": self.both.decoder.layers, "encoder": self.both.encoder.layers}
        found = [
            place for stack, layers in stacks.items() for i, layer in enumerate(layers) for place in of(layer, stack, i)
        ]
        norms = {"final_norm": self.both.decoder.norm, "encoder_norm": self.both.encoder.norm}
        return [*found, (self.embed, ("embed",), None), *((norm, (name,), None) for name, norm in norms.items())]

    def tensors(self) -> list[tuple[Any, Any, tuple[str, ...], int | None, bool]]:
        """(parameter, its part, path in jaxlm, layer, whether transposed)"""
        whole, found = slice(None), []
        for module, path, layer in self.places():
            if isinstance(module, torch.nn.MultiheadAttention):
                for k, name in enumerate(ATTENTION):
                    part = slice(k * D, (k + 1) * D)
                    found.append((module.in_proj_weight, part, (*path, name, "kernel"), layer, True))
                    found.append((module.in_proj_bias, part, (*path, name, "bias"), layer, False))
                module, path = module.out_proj, (*path, "out")
            kind = {torch.nn.Embedding: "embedding", torch.nn.LayerNorm: "scale"}.get(type(module), "kernel")
            found.append((module.weight, whole, (*path, kind), layer, kind == "kernel"))
            if getattr(module, "bias", None) is not None:
                found.append((module.bias, whole, (*path, "bias"), layer, False))
        return found

    def take(self, params: Any) -> None:
        with torch.no_grad():
            for parameter, part, path, layer, transposed in self.tensors():
                x = params
                for key in path:
                    x = x[key]
                x = np.array(x if layer is None else x[layer])
                parameter[part] = torch.from_numpy(x.T if transposed else x)

    def give(self, what: str, like: Any) -> Any:
        """Returns weights (`data`) or gradients (`grad`) as jaxlm's tree."""
        out = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), like)
        for parameter, part, path, layer, transposed in self.tensors():
            x = out
            for key in path[:-1]:
                x = x[key]
            got = getattr(parameter, what).detach().numpy()[part]
            x[path[-1]][... if layer is None else layer] = got.T if transposed else got
        return out


def batches(n: int) -> list[dict[str, np.ndarray]]:
    """Two pairs in each row, then padding, of which a row of answers may have more than one of prompts."""
    rng, out = np.random.default_rng(1), []
    for _ in range(n):
        tokens = {"prompts": rng.integers(0, VOCAB, (BATCH, S)), "inputs": rng.integers(0, VOCAB, (BATCH, T))}
        positions = {"prompts": np.zeros((BATCH, S)), "inputs": np.zeros((BATCH, T))}
        targets = np.full((BATCH, T), -1)
        for r in range(BATCH):
            ends = {
                "prompts": (rng.integers(2, 6), rng.integers(7, S)),
                "inputs": (rng.integers(2, 4), rng.integers(5, T)),
            }
            for name, (a, b) in ends.items():
                positions[name][r, :b] = np.concatenate([np.arange(a), np.arange(b - a)])
            filled = ends["inputs"][1]
            targets[r, :filled] = rng.integers(0, VOCAB, filled)
        batch = {
            "prompt_positions": positions["prompts"],
            "positions": positions["inputs"],
            "targets": targets,
            **tokens,
        }
        out.append({name: x.astype(np.int32) for name, x in batch.items()})
    return out


def torch_loss(peer: Peer, batch: dict[str, np.ndarray]) -> Any:
    targets = torch.from_numpy(batch["targets"]).long().flatten()
    return F.cross_entropy(peer(batch).flatten(0, 1), targets, ignore_index=-1)


@pytest.mark.parametrize("zero", [0, 3])
def test_three_adamw_steps_on_two_devices(zero: int) -> None:
    """Losses, gradient norms and, after the steps, all weights equal those of PyTorch on the whole batch."""
    c = config(zero)
    model, devices = make_model(c.model, VOCAB, T), jax.devices()[:2]
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        return np.asarray(0.3 * rng.standard_normal(x.shape) + (path[-1].key == "scale"), np.float32)

    params = jax.tree_util.tree_map_with_path(draw, model.shapes())
    peer = Peer()
    peer.take(params)
    jax.tree.map(np.testing.assert_array_equal, peer.give("data", params), params)  # each weight has a place
    decays = [p for p in peer.parameters() if p.dim() >= 2], [p for p in peer.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(decays, (0.1, 0.0), strict=True)],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    placement = Placement(c, model, devices)
    whole = placement.saved(placement.initial())
    assert whole is not None
    state = placement.restored(whole._replace(params=params))
    step = train_step.pmap_train_step(c, train_step.make_train_step(c, model, devices), devices)
    for batch in batches(3):
        optimizer.zero_grad()
        loss = torch_loss(peer, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), c.optim.clip_norm)
        optimizer.step()
        rows = {name: x.reshape(2, BATCH // 2, -1) for name, x in batch.items()}
        state, metrics = step(state, jax.device_put(rows, placement.batch))
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=2e-5)
    saved = placement.saved(state)
    assert saved is not None and norm.item() > c.optim.clip_norm
    expected = peer.give("data", params)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(saved.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5, err_msg=jax.tree_util.keystr(path))

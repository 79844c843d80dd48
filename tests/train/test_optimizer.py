"""Compares optimizers with the papers' formulas in NumPy and with optax, and tests how Muon shares its work."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm.config import OptimConfig, files
from jaxlm.model import make_model
from jaxlm.sync import Group
from jaxlm.sync.sharing import by_host
from jaxlm.train.muon import NEWTON_SCHULZ, orthogonalize
from jaxlm.train.optimizer import make_optimizer, matrix_mask
from jaxlm.train.schedules import make_schedule
from tests.decoders import with_

STEPS = 40
DEFAULT = files.load(Path(__file__).resolve().parents[2] / "configs" / "base.py")
BASE = dataclasses.replace(
    DEFAULT.optim,
    name="adamw",
    lr=0.1,
    adam_lr=0.03,
    embed_lr=0.06,
    schedule="linear",
    warmup_steps=3,
    decay_fraction=0.4,
    min_lr_ratio=0.1,
    weight_decay=0.2,
    b1=0.9,
    b2=0.95,
    eps=1e-6,
    momentum=0.8,
    clip_norm=1.0,
    accum_steps=1,
    ema_decay=0.0,
)
SHAPES = {
    "embed": {"embedding": (9, 4)},
    "layers": {
        "attention": {"query": {"kernel": (3, 4, 6), "bias": (3, 6)}},
        "mlp": {"down": {"kernel": (3, 8, 4)}},
        "norm": {"scale": (3, 4)},
    },
    "head": {"kernel": (4, 9)},
}
Flat = dict[tuple[str, ...], Any]
MATRICES = {
    ("embed", "embedding"),
    ("layers", "attention", "query", "kernel"),
    ("layers", "mlp", "down", "kernel"),
    ("head", "kernel"),
    ("layers", "wide", "kernel"),
}


def config(**changes: Any) -> OptimConfig:
    return dataclasses.replace(BASE, **changes)


def flat(tree: Any) -> Flat:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((k,), simple=True) for k in path): np.asarray(x) for path, x in leaves}


def draw(seed: int, shapes: Any = None) -> Any:
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return jax.tree.map(
        lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def lr_at(n: int, peak: float = 0.1) -> float:
    """Returns the rate of update n: linear warmup over 3 updates, then linear decay to a tenth."""
    return peak * min((n + 1) / 3, 1) * (1 - 0.9 * max(n - 3, 0) / 37)


def run(optimizer: optax.GradientTransformation, updates: int, shapes: Any = None) -> Flat:
    """Returns the parameters after some updates with random gradients."""
    params = draw(0, shapes)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        change, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, change), state

    for n in range(updates):
        params, state = step(params, state, draw(n + 1, shapes))
    return flat(params)


# Update rules in NumPy, in float64: (memory of this parameter, gradient, n) -> direction.


def adam(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:  # Kingma and Ba, algorithm 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
    return memory["m"] / (1 - 0.9 ** (n + 1)) / (np.sqrt(memory["v"] / (1 - 0.95 ** (n + 1))) + 1e-6)


def lion(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:  # Chen et al., algorithm 2
    m = memory.get("m", np.zeros_like(g))
    memory["m"] = 0.95 * m + 0.05 * g
    return np.sign(0.9 * m + 0.1 * g)


def nesterov(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:  # Sutskever et al., as PyTorch writes it
    memory["m"] = 0.8 * memory.get("m", 0) + g
    return g + 0.8 * memory["m"]


def adafactor(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:  # Shazeer and Stern, algorithms 4 and 5
    decay, square = 1 - (n + 1) ** -0.8, g**2 + 1e-30
    if g.shape[-2:] == (130, 128):  # optax factors dims of at least 128
        memory["r"] = decay * memory.get("r", 0) + (1 - decay) * square.mean(-1)
        memory["c"] = decay * memory.get("c", 0) + (1 - decay) * square.mean(-2)
        r, c = memory["r"], memory["c"]
        v = r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]
    else:
        memory["v"] = v = decay * memory.get("v", 0) + (1 - decay) * square
    u = g / np.sqrt(v)
    own = tuple(range(memory["stacked"], g.ndim))  # each layer's update is clipped by itself
    return u / np.maximum(1, np.sqrt((u**2).mean(own, keepdims=True)))


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Orthogonalizes through singular values: each step maps s to a s + b s^3 + c s^5."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s[..., None, :]) @ v


def muon(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:
    return newton_schulz(nesterov(memory, g, n)) * math.sqrt(max(1, g.shape[-1] / g.shape[-2]))


def follow(
    rule: Callable[..., np.ndarray], updates: int, shapes: Any = None, peak: float = 0.1, decay: float = 0.2
) -> Flat:
    params, memory = {k: x.astype(np.float64) for k, x in flat(draw(0, shapes)).items()}, {}
    for n in range(updates):
        for key, g in flat(draw(n + 1, shapes)).items():
            own = memory.setdefault(key, {"stacked": int(key[0] == "layers")})
            direction = rule(own, g.astype(np.float64), n)
            params[key] = params[key] - lr_at(n, peak) * (direction + decay * (key in MATRICES) * params[key])
    return params


@pytest.mark.parametrize("name, rule", [("adamw", adam), ("lion", lion), ("sgd", nesterov), ("adafactor", adafactor)])
def test_updates_follow_the_formulas(name: str, rule: Callable[..., np.ndarray]) -> None:
    shapes = (
        SHAPES | {"layers": SHAPES["layers"] | {"wide": {"kernel": (2, 130, 128)}}} if name == "adafactor" else SHAPES
    )
    got, expected = run(make_optimizer(config(name=name), STEPS), 5, shapes), follow(rule, 5, shapes)
    for key in expected:
        np.testing.assert_allclose(
            got[key], expected[key], rtol=0, atol=3e-6 * np.abs(expected[key]).max(), err_msg=str(key)
        )
        assert np.abs(got[key] - flat(draw(0, shapes))[key]).max() > 0.05


def test_adafactor_does_not_depend_on_the_size_of_gradients() -> None:
    """Updates have a root mean square of 1, even if squared gradients are about 1e-18."""
    optimizer = make_optimizer(config(name="adafactor", warmup_steps=0, lr=1.0, weight_decay=0.0), STEPS)
    params = draw(0)
    grads = jax.tree.map(lambda g: 1e-9 * g, draw(1))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for update in jax.tree.leaves(updates):
        assert math.sqrt(np.mean(np.square(update))) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embed_lr", [0.06, 0.0])
def test_muon_follows_the_formulas(tied: bool, embed_lr: float) -> None:
    """Matrices of layers: momentum, Newton-Schulz and decay. Embeddings and the rest: Adam, with rates of their own."""
    shapes = SHAPES | {"positions": {"embedding": (7, 4)}}
    if tied:
        del shapes["head"]
    got = run(make_optimizer(config(name="muon", embed_lr=embed_lr), STEPS), 5, shapes)
    hidden = follow(muon_where_matrix, 5, shapes)
    tables, rest = (follow(adam, 5, shapes, peak, decay=0.0) for peak in (embed_lr or 0.03, 0.03))
    for key in got:
        own = key[0] == "layers" and key[-1] == "kernel"
        # A tied embedding is the output layer; all rows of the positions are trained.
        table = key[0] == "embed" and not tied
        expected = (hidden if own else tables if table else rest)[key]
        np.testing.assert_allclose(got[key], expected, rtol=0, atol=2e-4 if own else 3e-6, err_msg=str(key))


def muon_where_matrix(memory: dict[str, Any], g: np.ndarray, n: int) -> np.ndarray:
    return muon(memory, g, n) if g.ndim == 3 else g


MASK = {
    "embed": {"embedding": True},
    "layers": {
        "attention": {"query": {"kernel": True, "bias": False}},
        "mlp": {"down": {"kernel": True}},
        "norm": {"scale": False},
    },
    "head": {"kernel": True},
}


def test_updates_equal_those_of_optax() -> None:
    def rate(n: Any) -> Any:
        return 0.1 * jnp.minimum((n + 1) / 3, 1) * (1 - 0.9 * jnp.maximum(n - 3, 0) / 37)

    peers = {
        "adamw": optax.adamw(rate, 0.9, 0.95, 1e-6, weight_decay=0.2, mask=MASK),
        "lion": optax.lion(rate, 0.9, 0.95, weight_decay=0.2, mask=MASK),
        "sgd": optax.sgd(rate, momentum=0.8, nesterov=True),
    }
    for name, peer in peers.items():
        c = config(name=name, weight_decay=0.0 if name == "sgd" else 0.2)
        got, expected = run(make_optimizer(c, STEPS), 4), run(peer, 4)
        for key in got:
            np.testing.assert_allclose(got[key], expected[key], rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}")


def test_muon_without_momentum_equals_that_of_optax() -> None:
    """Momenta differ (optax averages and corrects the bias); Newton-Schulz is invariant to their scale."""
    shapes = {"layers": {"a": {"kernel": (3, 4, 6)}, "b": {"kernel": (3, 8, 4)}}}
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    peer = optax.contrib.muon(
        lr_of := make_schedule(config(), STEPS),
        beta=0.0,
        weight_decay=0.2,
        muon_weight_dimension_numbers={"layers": {"a": {"kernel": dims}, "b": {"kernel": dims}}},
    )
    assert float(lr_of(0)) == pytest.approx(lr_at(0))
    got, expected = run(make_optimizer(config(name="muon", momentum=0.0), STEPS), 3, shapes), run(peer, 3, shapes)
    for key in got:
        np.testing.assert_allclose(got[key], expected[key], rtol=0, atol=2e-4)


# Muon


@pytest.mark.parametrize("shape", [(24, 24), (8, 64), (64, 8), (3, 16, 40), (3, 40, 16)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    """Singular vectors stay, singular values come close to 1, and the scale of the matrix does not matter."""
    assert NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    u, _, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    out = np.asarray(jax.jit(orthogonalize)(x))
    inner = np.swapaxes(u, -1, -2) @ out @ np.swapaxes(v, -1, -2)
    values = np.diagonal(inner, axis1=-2, axis2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(inner, values[..., None] * np.eye(values.shape[-1]), rtol=0, atol=1e-3)
    np.testing.assert_allclose(jax.jit(orthogonalize)(1000 * x), out, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(jax.jit(orthogonalize)(0 * x), 0 * x)
    large, small = max(shape[-2:]), min(shape[-2:])
    text = str(jax.make_jaxpr(orthogonalize)(x))
    # It computes the smaller of the two products.
    assert f"{small},{small}]" in text and (large == small or f"{large},{large}]" not in text)


@pytest.mark.parametrize(
    "devices, size, members",
    [(1, 1, None), (2, 2, None), (3, 3, None), (8, 8, None), (4, 2, ((0, 1), (2, 3))), (6, 3, ((0, 1, 2), (3, 4, 5)))],
)
def test_sharing_changes_no_number(devices: int, size: int, members: tuple[tuple[int, ...], ...] | None) -> None:
    """Three and five layers, on devices that divide them, that do not, and that are more than the layers."""
    shapes = {"layers": {"a": {"kernel": (3, 4, 6), "bias": (3, 6)}, "b": {"kernel": (5, 8, 4)}}}
    hosts = devices // size  # each has its own gradients, which must not mix
    params, grads = draw(0, shapes), [draw(1 + host, shapes) for host in range(hosts)]
    shared = make_optimizer(config(name="muon"), STEPS, by_host(Group("devices", size, members)))
    alone = make_optimizer(config(name="muon"), STEPS)
    state, update = alone.init(params), jax.jit(alone.update)
    step = jax.pmap(lambda g: shared.update(g, state, params)[0], axis_name="devices", devices=jax.devices()[:devices])
    got = flat(step(jax.tree.map(lambda *x: np.repeat(np.stack(x), size, axis=0), *grads)))
    for host in range(hosts):
        for key, x in flat(update(grads[host], state, params)[0]).items():
            assert np.abs(x).max() > 1e-3
            for device in range(host * size, (host + 1) * size):
                np.testing.assert_allclose(got[key][device], x, rtol=0, atol=1e-6, err_msg=f"{key} on {device}")
                np.testing.assert_array_equal(got[key][device], got[key][host * size])


# Weight decay


def real_params() -> Any:
    sizes = {"d_model": 8, "num_heads": 2, "num_kv_heads": 1, "d_ff": 12}
    c = with_(**sizes, activation="swiglu", position="learned", use_bias=True, qk_norm=True)
    shapes = make_model(c, 11, 5).shapes()
    return draw(0, jax.tree.map(lambda x: x.shape, shapes))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_only_matrices_decay(name: str) -> None:
    """With zero gradients, only decay moves parameters. Stacked scales and biases do not decay, although 2-D."""
    params = real_params()
    optimizer = make_optimizer(
        config(name=name, warmup_steps=0, schedule="constant", lr=0.1, adam_lr=0.1, embed_lr=0.1), STEPS
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates = flat(jax.jit(optimizer.update)(zeros, optimizer.init(params), params)[0])
    for key, p in flat(params).items():
        matrix = key[-1] in ("kernel", "embedding")
        if name == "muon" and key[0] != "layers":
            matrix = False  # parameters that Muon leaves to Adam do not decay
        np.testing.assert_allclose(updates[key], -0.1 * 0.2 * p * matrix, rtol=1e-6, atol=1e-12, err_msg=str(key))
    mask = flat(matrix_mask(params))
    assert {k for k, v in mask.items() if v} == {k for k in mask if k[-1] in ("kernel", "embedding")}
    assert not mask["layers", "attention_norm", "scale"] and not mask["layers", "mlp", "up", "bias"]
    assert mask["head", "kernel"] and mask["embed", "embedding"]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_the_schedule_counts_updates(name: str) -> None:
    """Update n is scaled by rate n: with a constant gradient and no memory, updates have these ratios."""
    c = config(name=name, momentum=0.0, b1=0.0, b2=0.0, weight_decay=0.0, schedule="linear", adam_lr=0.1, embed_lr=0.1)
    optimizer = make_optimizer(c, STEPS)
    params, grads = draw(0), draw(1)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    sizes = []
    for _ in range(5):
        updates, state = update(grads, state, params)
        sizes.append(np.abs(updates["layers"]["mlp"]["down"]["kernel"]).mean())
    np.testing.assert_allclose(np.array(sizes) / sizes[2], [lr_at(n) / lr_at(2) for n in range(5)], rtol=1e-4)

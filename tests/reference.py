"""The Transformer in NumPy: one sequence at a time, one head at a time, in float64."""

import itertools
import math

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import Params


def norm(x: np.ndarray, p: Params, kind: str, eps: float = 0) -> np.ndarray:
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + (eps or 1e-6)) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + (eps or 1e-5)) * p["scale"] + p.get("bias", 0)


def linear(x: np.ndarray, p: Params) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x_TC: np.ndarray, theta: float, fraction: float = 1, longer: float = 1) -> np.ndarray:
    """Rotates each pair (i, i + C/2), as a complex number, by the position times theta^(-2i/C), in wavelengths that are
    longer by a factor; with a fraction, of that many of the channels.
    """
    if fraction < 1:
        part = int(x_TC.shape[1] * fraction)
        return np.concatenate([rotate(x_TC[:, :part], theta, 1, longer), x_TC[:, part:]], axis=1)
    T, C = x_TC.shape
    turned = (x_TC[:, : C // 2] + 1j * x_TC[:, C // 2 :]) * np.exp(
        1j * np.outer(np.arange(T), theta ** (-2 * np.arange(C // 2) / C) / longer)
    )
    return np.concatenate([turned.real, turned.imag], axis=1)


def offset_keys(k_TC: np.ndarray) -> np.ndarray:
    """Takes the second half of the channels of each half from the row before."""
    quarter, shifted = k_TC.shape[1] // 4, k_TC.copy()
    for first in (quarter, k_TC.shape[1] // 2 + quarter):
        half = slice(first, first + k_TC.shape[1] // 2 - quarter)
        shifted[0, half], shifted[1:, half] = 0, k_TC[:-1, half]
    return shifted


def attention(
    q_TC: np.ndarray,
    k_TC: np.ndarray,
    v_TC: np.ndarray,
    *,
    window: int = 0,
    divided: float = 0,
    cap: float = 0,
    causal: bool = True,
) -> np.ndarray:
    out = np.zeros((len(q_TC), v_TC.shape[1]))
    for t in range(len(q_TC)):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1 if causal else None)
        scores = k_TC[seen] @ q_TC[t] / math.sqrt(divided or q_TC.shape[1])
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores - scores.max())
        out[t] = weights / weights.sum() @ v_TC[seen]
    return out


def mlp(x: np.ndarray, p: Params, activation: str) -> np.ndarray:
    up = linear(x, p["up"])
    if activation == "swiglu":
        gate = linear(x, p["gate"])
        up = gate / (1 + np.exp(-gate)) * up
    elif activation == "geglu":
        up = gelu(linear(x, p["gate"])) * up
    else:
        up = {"gelu": gelu, "relu": lambda u: np.maximum(u, 0), "relu2": lambda u: np.maximum(u, 0) ** 2}[activation](
            up
        )
    return linear(up, p["down"])


def post(x: np.ndarray, p: Params, name: str, c: ModelConfig) -> np.ndarray:
    return norm(x, p[name], c.norm, c.norm_eps) if c.post_norms else x


def embedded(c: ModelConfig, params: Params, tokens_T: np.ndarray, table: str) -> np.ndarray:
    """What the first layer reads, [T, D]. Args: table: the key of learned positions."""
    x = params["embed"]["embedding"][tokens_T] * (math.sqrt(c.d_model) if c.scale_embeddings else 1)
    if c.position == "learned":
        x = x + params[table]["embedding"][: len(x)]
    elif c.position == "sinusoidal":
        for t, i in itertools.product(range(len(x)), range(c.d_model // 2)):
            angle = t / 10_000 ** (2 * i / c.d_model)
            x[t, i] += math.sin(angle)
            x[t, c.d_model // 2 + i] += math.cos(angle)
    return x


def attended(
    c: ModelConfig, a: Params, h: np.ndarray, layer: int, causal: bool = True, others: np.ndarray | None = None
) -> np.ndarray:
    """The output of an attention with parameters `a`: of h to itself, or to `others`, without positions."""
    H, K = c.num_heads, c.num_kv_heads or c.num_heads
    C = c.head_dim or c.d_model // H
    everywhere = not c.window or (c.global_every and (layer + 1) % c.global_every == 0)
    theta, longer = c.rope_theta, c.rope_factor if c.rope_scaling == "linear" else 1
    if not everywhere and c.rope_local_theta:
        theta, longer = c.rope_local_theta, 1
    q, k, v = (
        linear(h if others is None or name == "query" else others, a[name]) for name in ("query", "key", "value")
    )
    heads = []
    for head in range(H):
        group = head // (H // K)  # neighbouring query heads share a key/value head
        own, shared = slice(head * C, (head + 1) * C), slice(group * C, (group + 1) * C)
        q_TC, k_TC = q[:, own], k[:, shared]
        if c.qk_norm:
            q_TC = norm(q_TC, a["query_norm"], "rmsnorm", c.norm_eps)
            k_TC = norm(k_TC, a["key_norm"], "rmsnorm", c.norm_eps)
        if c.position == "rope" and others is None:
            q_TC, k_TC = (rotate(x_TC, theta, c.rope_fraction, longer) for x_TC in (q_TC, k_TC))
        if c.key_offset:
            k_TC = offset_keys(k_TC)
        how = {"window": 0 if everywhere else c.window, "divided": c.score_dim, "cap": c.attention_softcap}
        heads.append(attention(q_TC, k_TC, v[:, shared], causal=causal and others is None, **how))
    return linear(np.concatenate(heads, axis=1), a["out"])


def encoded(c: ModelConfig, params: Params, prompt_S: np.ndarray) -> np.ndarray:
    """What the encoder makes of a prompt, [S, D]; parameters are float64."""
    x = embedded(c, params, prompt_S, "encoder_positions")
    for layer in range(c.encoder_layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["encoder"])
        h = norm(x, p["attention_norm"], c.norm, c.norm_eps)
        x = x + post(attended(c, p["attention"], h, layer, causal=False), p, "attention_post_norm", c)
        h = norm(x, p["mlp_norm"], c.norm, c.norm_eps)
        x = x + post(mlp(h, p["mlp"], c.activation), p, "mlp_post_norm", c)
    return norm(x, params["encoder_norm"], c.norm, c.norm_eps)


def logits(
    c: ModelConfig,
    params: Params,
    tokens_T: np.ndarray,
    behind: list[np.ndarray] | None = None,
    prompt_S: np.ndarray | None = None,
) -> np.ndarray:
    """The logits [T, V]; appends the residual stream behind each layer, [T, D], to `behind`."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    read = None if prompt_S is None else encoded(c, params, prompt_S)
    x = embedded(c, params, tokens_T, "positions")
    for layer in range(c.num_layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        h = norm(x, p["attention_norm"], c.norm, c.norm_eps)
        x = x + post(attended(c, p["attention"], h, layer), p, "attention_post_norm", c)
        if read is not None:
            h = norm(x, p["cross_norm"], c.norm, c.norm_eps)
            x = x + post(attended(c, p["cross"], h, layer, others=read), p, "cross_post_norm", c)
        h = norm(x, p["mlp_norm"], c.norm, c.norm_eps)
        x = x + post(mlp(h, p["mlp"], c.activation), p, "mlp_post_norm", c)
        if behind is not None:
            behind.append(x)
    x = norm(x, params["final_norm"], c.norm, c.norm_eps)
    logits = x @ params["embed"]["embedding"].T if c.tie_embeddings else x @ params["head"]["kernel"]
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def mean_nll(c: ModelConfig, params: Params, tokens_BT: np.ndarray) -> float:
    """Mean negative log-likelihood of each token given those before it."""
    total = 0.0
    for row in tokens_BT:
        x_TV = logits(c, params, row[:-1])
        log_z = np.log(np.exp(x_TV - x_TV.max(-1, keepdims=True)).sum(-1)) + x_TV.max(-1)
        total += (log_z - x_TV[np.arange(len(row) - 1), row[1:]]).sum()
    return total / tokens_BT[:, 1:].size

"""A Transformer as pure functions of its parameters, for one device. Shape names as in blocks.py."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.blocks import STATISTICS, Cache
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.cross_attention import EncodedCache, Prompts
from jaxlm.model.network import OnLayer, Params, Transformer
from jaxlm.model.tensor import ALONE, Tensor


class Model(NamedTuple):
    """A decoder, with an encoder or without, as pure functions of its parameters."""

    init: Callable[[jax.Array], Params]  # (key) -> params
    shapes: Callable[[], Params]  # () -> shapes and dtypes of the parameters
    # (params, tokens_BT, dropout_keys_B=None, positions_BT=None, prompts=None, on_layer=None) -> final states x_ND.
    # With positions, a row holds several documents; each begins at position 0 and attends only to itself and, if there
    # is an encoder, to its prompt. With `on_layer`, each layer uses on_layer(its slice of params[stack], stack), which
    # may then hold more than parameters; the stacks are STACKS.
    hidden: Callable[..., jax.Array]
    # The same arguments -> (x_ND, sum of the squares of each layer's output, float32 [L], without a gradient)
    hidden_and_squares: Callable[..., tuple[jax.Array, jax.Array]]
    # `hidden` in three parts, for models of which a device holds some layers: (params, tokens_BT, dropout_keys_B,
    # positions_BT) -> x_nD; (params, x_nD, numbers of the layers in params, shape of tokens_BT, dropout_keys_B,
    # positions_BT) -> x_nD; (params, x_nD) -> x_ND
    begin: Callable[..., jax.Array]
    run: Callable[..., jax.Array]
    end: Callable[[Params, jax.Array], jax.Array]
    output_params: Callable[[Params], Params]  # the parameters that `unembed` reads
    unembed: Callable[[Params, jax.Array], jax.Array]  # (params or output_params, x_ND) -> float32 logits_NV
    init_cache: Callable[..., Cache]  # (B, length, tokens of a prompt of the encoder=0)
    # (params, tokens_BT, cache, start, prompts=None) -> (logits_BTV, cache) for tokens at start, start + 1, ... If
    # there is an encoder, the first call gets the prompts, one a row, and later ones find them in the cache.
    decode: Callable[..., tuple[jax.Array, Cache]]
    having: Callable[..., "Model"]  # the same model with another platform, on_layer or tensor (see make_model)
    tensor: Tensor  # what this device computes together with others
    context: Context  # what it has of each sequence
    vocab_size: int
    max_positions: int | None  # number of positions; None = unlimited (RoPE)
    # LongRoPE turns long texts otherwise, so the first `decode` of a prompt of at least this many tokens must read as
    # many; 0 = any number.
    first_read: int


def make_model(
    config: ModelConfig,
    vocab_size: int,
    max_len: int,
    platform: str = "",
    on_layer: OnLayer | None = None,
    tensor: Tensor = ALONE,
    context: Context = WHOLE,
) -> Model:
    """Returns the functions of a model over `vocab_size` tokens that is trained on sequences of `max_len`.

    In longer texts a decoded token sees the last `max_len` tokens. Learned and sinusoidal positions end at `max_len`.

    Args:
      platform: what the functions are compiled for, cpu or gpu; "" = JAX's default.
      on_layer: for functions that are given none.
      tensor: if it has several devices, `init` makes parameters of the shapes that one of them holds, of any content;
        `hidden` and `unembed` return all rows, and the logits of this device's tokens. The cache is for one device.
      context: if it has several devices, functions take whole sequences, and return this device's tokens of them.
    """
    default = on_layer
    given = {"platform": platform, "on_layer": on_layer, "tensor": tensor, "context": context}

    def decoder(on_layer: OnLayer | None = None, tensor: Tensor = tensor, context: Context = context) -> Transformer:
        kind = platform or jax.default_backend()
        return Transformer(config, vocab_size, max_len, kind, on_layer or default, tensor, context)

    # Flax does not tell type checkers what a method returns.
    def call(method: str, params: Params, *args: Any, on_layer: OnLayer | None = None) -> Any:
        return decoder(on_layer).apply({"params": params}, *args, method=method)

    def init(key: jax.Array, size: int = tensor.size) -> Params:
        tokens_BT = jnp.zeros((1, size), jnp.int32)
        return decoder(tensor=Tensor(size).alone(), context=WHOLE).init(key, tokens_BT)["params"]

    @cache  # a trace takes 0.1 s
    def shapes(size: int) -> Params:
        return jax.eval_shape(partial(init, size=size), jax.random.key(0))

    def having(**changes: Any) -> Model:
        other = make_model(config, vocab_size, max_len, **(given | changes))
        return other._replace(shapes=partial(shapes, other.tensor.size))

    def hidden(
        params: Params,
        tokens_BT: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        prompts: Prompts | None = None,
        on_layer: OnLayer | None = None,
    ) -> jax.Array:
        inputs = tokens_BT, dropout_keys_B, positions_BT, None, 0, prompts
        return call("hidden", params, *inputs, on_layer=on_layer)[0]

    def hidden_and_squares(
        params: Params,
        tokens_BT: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        prompts: Prompts | None = None,
        on_layer: OnLayer | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        model: Any = decoder(on_layer)
        inputs = tokens_BT, dropout_keys_B, positions_BT, None, 0, prompts
        (x_ND, _), found = model.apply({"params": params}, *inputs, method="hidden", mutable=[STATISTICS])
        return x_ND, found[STATISTICS]["layers"]["squares"][0]

    def run(params: Params, *inputs: Any) -> jax.Array:
        return call("run", params, *inputs)[0]

    def output_params(params: Params) -> Params:
        name = "embed" if config.tie_embeddings else "head"
        return {name: params[name]}

    def unembed(params: Params, x_ND: jax.Array) -> jax.Array:
        return call("unembed", params, x_ND)

    def init_cache(batch: int, length: int, prompt_length: int = 0) -> Cache:
        def keys_and_values(length: int) -> tuple[jax.Array, jax.Array]:
            shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
            return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

        if not config.encoder_layers:
            return Cache(*keys_and_values(length))
        visible = jnp.zeros((config.num_layers, batch, prompt_length), bool)
        return Cache(*keys_and_values(length), EncodedCache(*keys_and_values(prompt_length), visible))

    def decode(
        params: Params, tokens_BT: jax.Array, cache: Cache, start: jax.Array, prompts: Prompts | None = None
    ) -> tuple[jax.Array, Cache]:
        x_ND, cache = call("hidden", params, tokens_BT, None, None, cache, start, prompts)
        return unembed(params, x_ND).reshape(*tokens_BT.shape, -1), cache

    max_positions = None if config.position == "rope" else max_len
    first_read = config.rope_original + 1 if config.rope_scaling == "longrope" else 0
    return Model(
        init,
        partial(shapes, tensor.size),
        hidden,
        hidden_and_squares,
        partial(call, "begin"),
        run,
        partial(call, "end"),
        output_params,
        unembed,
        init_cache,
        decode,
        having,
        tensor,
        context,
        vocab_size,
        max_positions,
        first_read,
    )


def num_params(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, params: Params, seq_len: int) -> float:
    """Floating-point operations for one training token, forward and backward (PaLM, appendix B).

    6 for each parameter that takes part in products, plus those of attention. With an encoder, tokens are the
    decoder's, and the encoder's work is shared among them.
    """
    return 6 * multiplied(config, params, seq_len) + attention_flops(config, seq_len)


def multiplied(config: ModelConfig, params: Params, seq_len: int) -> float:
    """Returns how many of these parameters multiply a token: all but those of look-up tables. A parameter that
    multiplies the encoder's tokens counts encoder_len / seq_len times.
    """
    lookups = ("positions", "encoder_positions", *(() if config.tie_embeddings else ("embed",)))
    all_but_lookups = num_params({name: x for name, x in params.items() if name not in lookups})
    if not config.encoder_layers:
        return all_but_lookups
    cross = params.get("layers", {}).get("cross", {})
    of_prompts = {name: params.get(name) for name in ("encoder", "encoder_norm")}
    of_prompts |= {name: cross.get(name) for name in ("key", "value", "key_norm")}
    return all_but_lookups + num_params(of_prompts) * (config.encoder_len / seq_len - 1)


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    """Those of the products of queries with keys and of weights with values: 12 * H * C * T in each layer, where T is
    at most the layer's window.
    """
    L, window = config.num_layers, min(config.window or seq_len, seq_len)
    global_layers = L // config.global_every if config.global_every else 0
    keys = global_layers * seq_len + (L - global_layers) * window
    if config.encoder_layers:
        S = config.encoder_len
        keys += L * S + config.encoder_layers * S * S / seq_len
    return 12 * config.num_heads * config.head_size * keys

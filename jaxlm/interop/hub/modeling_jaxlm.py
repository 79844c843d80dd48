"""The decoder of jaxlm in PyTorch: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

It computes what config.json describes under "model", where keys have their meaning in `jaxlm train --help`. It needs
PyTorch and transformers alone, and has no dropout. Part of jaxlm, Apache-2.0.

Shapes: B batch, T tokens of this call, S tokens so far, those of this call included, H query heads, K key/value heads,
C size of a head, R rotated channels of a head, D d_model.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class JaxlmConfig(PretrainedConfig):
    model_type = "jaxlm"

    def __init__(self, model=None, vocab_size=0, max_position_embeddings=0, **kwargs):
        super().__init__(**kwargs)
        self.model, self.vocab_size = model or {}, vocab_size
        self.max_position_embeddings = max_position_embeddings  # a token sees this many at most, itself included


def keys_of(config):
    """The keys of the model, with 0 replaced by what it stands for."""
    c = SimpleNamespace(**config.model, vocab_size=config.vocab_size, context=config.max_position_embeddings)
    c.num_kv_heads = c.num_kv_heads or c.num_heads
    c.head_dim = c.head_dim or c.d_model // c.num_heads
    c.d_ff = c.d_ff or 4 * c.d_model
    c.score_dim = c.score_dim or c.head_dim
    return c


class Norm(nn.Module):
    """LayerNorm, or without `center` RMSNorm; computed in float32."""

    def __init__(self, size, center, bias, eps):
        super().__init__()
        self.center, self.eps = center, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        y = x.float()
        if self.center:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def norm(c):
    if c.norm == "rmsnorm":
        return Norm(c.d_model, center=False, bias=False, eps=c.norm_eps or 1e-6)
    return Norm(c.d_model, center=True, bias=c.use_bias, eps=c.norm_eps or 1e-5)


def gelu(x):
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


ACTIVATIONS = {"gelu": gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "swiglu": F.silu, "geglu": gelu}


class Mlp(nn.Module):
    """down(f(up(x))), or if gated down(up(x) * f(gate(x)))."""

    def __init__(self, c):
        super().__init__()
        self.function = ACTIVATIONS[c.activation]
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=c.use_bias)
        gated = c.activation in ("swiglu", "geglu")
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=c.use_bias) if gated else None
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=c.use_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.function(self.up_proj(x)))
        return self.down_proj(self.up_proj(x) * self.function(self.gate_proj(x)))


def rope_tables(c, positions_BT, local):
    """Cosines and sines, float32 `[B, 1, T, R / 2]`; `local`: of layers with a window that have their own base."""
    R, growth = round(c.head_dim * c.rope_fraction), 1.0
    base = c.rope_local_theta if local else c.rope_theta
    frequencies = base ** -(torch.arange(0, R, 2, dtype=torch.float64) / R)
    scaling = "none" if local else c.rope_scaling
    if scaling == "linear":
        frequencies = frequencies / c.rope_factor
    elif scaling == "llama3":
        fits = c.rope_original * frequencies / (2 * math.pi)  # how often a wavelength fits in the old context
        weight = ((fits - 1) / 3).clamp(0, 1)
        frequencies = frequencies * (weight + (1 - weight) / c.rope_factor)
    frequencies = frequencies.to(positions_BT.device, torch.float32)
    if scaling == "longrope":  # in long texts, other numbers than in short ones
        short, long = (frequencies.new_tensor([*map(float, s.split())]) for s in (c.rope_short, c.rope_long))
        is_long_B1 = positions_BT.amax(1, keepdim=True) >= c.rope_original
        frequencies = frequencies / torch.where(is_long_B1, long, short)
        growth = math.sqrt(1 + math.log(c.rope_factor) / math.log(c.rope_original))
    angles = positions_BT[:, None, :, None].float() * frequencies.view(-1, 1, 1, R // 2)
    return angles.cos() * growth, angles.sin() * growth


def rotate(x_BHTC, tables):
    """Turns each pair of channels (i, i + R / 2) of the first R."""
    cos, sin = tables
    R = 2 * cos.shape[-1]
    a, b = x_BHTC[..., :R].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BHTC.dtype)
    return torch.cat([turned, x_BHTC[..., R:]], dim=-1)


def offset_keys(k_BKSC, mask_BS):
    """Replaces half of each key's channels by those of the previous token's key, by zeros where there is none."""
    C, real_B1S1 = k_BKSC.shape[-1], mask_BS[:, None, :, None].to(k_BKSC.dtype)
    before_BKSC = F.pad(k_BKSC * real_B1S1, (0, 0, 1, 0))[:, :, :-1]
    own_C = torch.arange(C, device=k_BKSC.device) % (C // 2) < C // 4
    return torch.where(own_C, k_BKSC, before_BKSC)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c, self.layer, bias = c, layer, c.use_bias or c.qkv_bias
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.d_model, bias=c.use_bias)
        if c.qk_norm:
            self.q_norm = Norm(c.head_dim, center=False, bias=False, eps=c.norm_eps or 1e-6)
            self.k_norm = Norm(c.head_dim, center=False, bias=False, eps=c.norm_eps or 1e-6)

    def forward(self, x_BTD, visible, tables, mask_BS, cache):
        c, (B, T, _) = self.c, x_BTD.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x_BTD).view(B, T, -1, c.head_dim).transpose(1, 2) for project in projections)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if c.key_offset:  # of the cache's keys too, which are kept as they were
            k = offset_keys(k, mask_BS)
        k, v = (x.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(c.score_dim)
        if c.attention_softcap:
            scores = c.attention_softcap * torch.tanh(scores / c.attention_softcap)
        # Not -inf, because padding before a text sees nothing, and must stay finite.
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.is_global = not c.window or bool(c.global_every and (layer + 1) % c.global_every == 0)
        self.post_norms = c.post_norms
        self.self_attn, self.mlp, self.input_layernorm = Attention(c, layer), Mlp(c), norm(c)
        self.post_attention_layernorm = norm(c)  # Llama's name of the norm before the MLP, Gemma's of the one here
        if c.post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(c), norm(c)

    def forward(self, x, *inputs):
        a = self.self_attn(self.input_layernorm(x), *inputs)
        if not self.post_norms:
            x = x + a
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(a)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        if c.position == "learned":
            self.embed_positions = nn.Embedding(c.context, c.d_model)
        self.layers = nn.ModuleList([Block(c, layer) for layer in range(c.num_layers)])
        self.norm = norm(c)

    def forward(self, tokens_BT, positions_BT, mask_BS, cache, past):
        c, T = self.c, tokens_BT.shape[1]
        x = self.embed_tokens(tokens_BT)
        if c.scale_embeddings:
            x = x * torch.tensor(math.sqrt(c.d_model), dtype=x.dtype)
        x = x + self.added(positions_BT).to(x.dtype) if c.position != "rope" else x
        # Which tokens each one sees: as in jaxlm, never more than in training.
        age_TS = (torch.arange(past, past + T)[:, None] - torch.arange(past + T)).to(x.device)
        causal_B1TS = (age_TS >= 0) & mask_BS[:, None, None]
        in_context, in_window = (causal_B1TS & (age_TS < n) for n in (c.context, min(c.window or c.context, c.context)))
        tables = rope_tables(c, positions_BT, local=False) if c.position == "rope" else None
        local = rope_tables(c, positions_BT, local=True) if tables and c.rope_local_theta else tables
        for block in self.layers:
            x = block(x, *((in_context, tables) if block.is_global else (in_window, local)), mask_BS, cache)
        return self.norm(x)

    def added(self, positions_BT):
        """Position embeddings to add to those of tokens."""
        if positions_BT.max() >= self.c.context:
            raise ValueError(
                f"position {positions_BT.max()}; allowed: less than max_position_embeddings={self.c.context}"
            )
        if self.c.position == "learned":
            return self.embed_positions(positions_BT)
        steps = torch.arange(0, self.c.d_model, 2, device=positions_BT.device) / self.c.d_model
        angles = positions_BT[..., None] * torch.exp(-math.log(10_000) * steps)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class JaxlmForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = JaxlmConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.keys = keys_of(config)
        self.model = Decoder(self.keys)
        if not self.keys.tie_embeddings:
            self.lm_head = nn.Linear(self.keys.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, cache=None, labels=None,
        use_cache=False, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        """Logits in float32. `attention_mask` `[B, S]` is 0 for padding, on either side of a text."""
        cache = past_key_values if cache is None else cache  # the older and the newer name
        cache = DynamicCache() if cache is None and use_cache else cache
        past = 0 if cache is None else cache.get_seq_length()
        shape = len(input_ids), past + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask has shape {[*attention_mask.shape]}; allowed: {[*shape]}")
        mask_BS = (input_ids.new_ones(shape) if attention_mask is None else attention_mask).bool()
        if position_ids is None:
            position_ids = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, past:]
        x_BTD = self.model(input_ids, position_ids, mask_BS, cache, past)
        x_BTD = x_BTD[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x_BTD[:, logits_to_keep]
        head = self.model.embed_tokens if self.keys.tie_embeddings else self.lm_head
        logits = F.linear(x_BTD, head.weight).float()
        if cap := self.keys.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        if labels is None:
            return CausalLMOutputWithPast(None, logits, cache)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, cache)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        context, mask = self.keys.context, kwargs.get("attention_mask")
        if self.keys.position == "rope" or input_ids.shape[1] <= context:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        # Positions end here: as in jaxlm, the last tokens are read again, as a text of their own.
        mask = None if mask is None else mask[:, -context:]
        return {"input_ids": input_ids[:, -context:], "attention_mask": mask, "use_cache": False}

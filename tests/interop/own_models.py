"""Models that no architecture of `transformers` has. Together they have every key of the model."""

from jaxlm.config import ModelConfig
from tests.decoders import with_

OWN: dict[str, ModelConfig] = {
    "base": with_(norm="rmsnorm", activation="relu2", qk_norm=True, key_offset=True, num_kv_heads=2, vocab_multiple=8),
    "learned": with_(
        position="learned", activation="relu", use_bias=True, post_norms=True, key_offset=True, tie_embeddings=True,
        scale_embeddings=True, attention_softcap=1.5, logit_softcap=2.0, vocab_multiple=8,
    ),
    "sinusoidal": with_(
        position="sinusoidal", activation="geglu", qkv_bias=True, window=5, global_every=2, num_layers=3, head_dim=6,
        score_dim=9, norm_eps=1e-2,
    ),
    "local": with_(
        activation="swiglu", qk_norm=True, num_kv_heads=1, num_layers=3, window=6, global_every=3, head_dim=8,
        rope_fraction=0.5, rope_local_theta=7.0, rope_scaling="llama3", rope_factor=8.0, rope_original=16,
        key_offset=True,
    ),
    "linear": with_(norm="rmsnorm", use_bias=True, qk_norm=True, norm_eps=1e-2, window=4,
                    rope_scaling="linear", rope_factor=4.0),
    "longrope": with_(norm="rmsnorm", rope_scaling="longrope", rope_original=8, rope_factor=4.0, key_offset=True,
                      rope_short="1.0 1.5", rope_long="2.0 4.0"),
}  # fmt: skip

"""The decoder as pure functions of its parameters: hidden states, logits, losses, sampling.

Only `network.py`, `blocks.py` and `layers.py` know Flax. Other rooms import the names below from here, and `losses`,
`lora`, `generate`, `tensor` and `context` as modules.

May import: config.
"""

from jaxlm.model.decoder import (
    Cache,
    Model,
    Params,
    attention_flops,
    flops_per_token,
    make_model,
    multiplied,
    num_params,
)

__all__ = ["Cache", "Model", "Params", "attention_flops", "flops_per_token", "make_model", "multiplied", "num_params"]

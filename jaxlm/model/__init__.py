"""The decoder as pure functions of its parameters: states, logits, losses, sampling. It may import `config` alone."""

from jaxlm.model.decoder import Cache, Params
from jaxlm.model.model import Model, flops_per_token, make_model, num_params

__all__ = ["Cache", "Model", "Params", "flops_per_token", "make_model", "num_params"]

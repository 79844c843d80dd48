"""Formulas for the bytes that a device sends in a step in each direction of the grid.

Shapes: m micro-batches, L layers of a device, N tokens of a micro-batch on a device of a tensor group (all rows), D
d_model, T devices of a tensor group, C of a context group, a bytes of a number of the computation.
"""

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.model.remat import layer_loop
from jaxlm.plan.collectives import SENT
from jaxlm.sync.zero import Zero, is_stacked
from jaxlm.train import trained
from jaxlm.train.backward import gathered_bytes
from jaxlm.train.one_device import OneDevice
from jaxlm.train.schedule_table import forward_phases

FLOAT = 4  # bytes of a float32
# {model.remat: how many of a layer's two gathers and two scatters the backward pass computes again}
AGAIN = {"none": 0, "elementwise": 2, "dots": 3, "full": 3}
# The same for the gather and the scatter of attention to an encoder: none is the last of its layer.
AGAIN_CROSS = {"none": 0, "elementwise": 1, "dots": 2, "full": 2}


def by_purpose(config: Config, own: OneDevice) -> dict[str, float]:
    """{purpose: bytes that a device sends in a step}, for gradients, parameters, and the directions in a replica."""
    return between_replicas(config, own) | in_replica(config, own)


def between_replicas(config: Config, own: OneDevice) -> dict[str, float]:
    """Those of gradients and, with ZeRO, parameters."""
    p = config.parallel
    reductions = config.optim.accum_steps if p.zero > 1 else 1  # every micro-batch is reduced
    found = {"gradients": reductions * own.sync.sent_bytes(trained.part(config, own.params))}
    if p.zero:
        found["parameters"] = gathered_bytes(config, Zero(own.grid.copies, own.params), own.params)
    return found


def in_replica(config: Config, own: OneDevice) -> dict[str, float]:
    """Those of devices that work on the same rows of the batch."""
    p = config.parallel
    rows = config.batch_size // own.grid.size("data") // config.optim.accum_steps
    tokens = rows * config.seq_len // p.context
    found = {}
    if p.tensor > 1:
        found["tensor"] = _tensor(config, own, tokens) + _tensor_of_encoder(config, own, rows)
    if p.context > 1:
        found["context"] = _context(config, own, rows, tokens)
    if p.pipeline > 1:
        found["pipeline"] = _pipeline(config, own, tokens)
    if own.cuts:
        found["copies"] = _copies(config, own)
    return found


def _itemsize(config: Config) -> int:
    return jnp.dtype(config.model.dtype).itemsize


def layers_run(config: Config) -> int:
    """How often a device runs a layer in a step, forward and as often backward."""
    return _phases(config) * config.parallel.layers_of_chunk(config.model.num_layers)


def _phases(config: Config) -> int:
    """How often a device runs its layers, or a chunk of them, forward in a step and as often backward."""
    p, m = config.parallel, config.optim.accum_steps
    return m if p.pipeline == 1 else forward_phases(p.pipeline, m, p.chunks)


def _again(config: Config, own: OneDevice) -> tuple[bool, str]:
    """Whether the backward pass runs chunks again, and what it computes again in layers."""
    _, remat = layer_loop(config.model, own.grid.platform)
    return config.parallel.pipeline > 1, remat


def _tensor(config: Config, own: OneDevice, tokens: int) -> float:
    """Two gathers and two scatters of N D numbers in each layer and pass; a scatter of embeddings in each pass; in each
    micro-batch a gather of final states and a scatter of their gradient and, for each token, the largest logit and
    three sums.
    """
    T, m = config.parallel.tensor, config.optim.accum_steps
    array = SENT["all-gather"](T) * tokens * config.model.d_model * _itemsize(config)
    chunks_again, remat = _again(config, own)
    of_layers = layers_run(config) * (8 + 4 * chunks_again + AGAIN[remat])
    logits = SENT["all-reduce"](T) * tokens * 4 * FLOAT
    return array * (of_layers + _phases(config) * (2 + chunks_again) + 2 * m) + m * logits


def _tensor_of_encoder(config: Config, own: OneDevice, rows: int) -> float:
    """What an encoder adds: in each of its layers as much as in the decoder's, of its own tokens, with a scatter of
    embeddings and a gather of states in each pass; in each layer of the decoder one gather and one scatter more.
    """
    c, T = config.model, config.parallel.tensor
    if not c.encoder_layers:
        return 0.0
    _, remat = _again(config, own)
    of_encoder = rows * c.encoder_len * (c.encoder_layers * (8 + AGAIN[remat]) + 4)
    of_decoder = rows * config.seq_len * c.num_layers * (4 + AGAIN_CROSS[remat])
    numbers = config.optim.accum_steps * (of_encoder + of_decoder) * c.d_model
    return SENT["all-gather"](T) * numbers * _itemsize(config)


def _context(config: Config, own: OneDevice, rows: int, tokens: int) -> float:
    """Keys and values of a device go to C - 1 others in each pass, in the backward pass with their gradients, which
    then go home. With packed documents, so do the documents' numbers; with `key_offset`, the ends of both chunks.
    """
    c, C = config.model, config.parallel.context
    heads = own.model.tensor.part(c.kv_heads)
    numbers = 2 * tokens * heads * c.head_size
    keys = numbers * _itemsize(config) + (tokens * 4 if config.data.packing == "document" else 0)
    chunks_again, remat = _again(config, own)
    forward = (C - 1) * keys * (1 + chunks_again + (remat in ("full", "dots")))
    edges = 2 * rows * heads * c.head_size * _itemsize(config) * (2 + chunks_again + (remat != "none"))
    backward = (C - 1) * keys + C * numbers * FLOAT
    return layers_run(config) * (forward + backward + (edges if c.key_offset else 0))


def _pipeline(config: Config, own: OneDevice, tokens: int) -> float:
    """A micro-batch's states, N D / T numbers, after each phase; and four sums of losses."""
    p = config.parallel
    array = tokens * config.model.d_model // p.tensor * _itemsize(config)
    return 2 * _phases(config) * array + SENT["all-reduce"](p.pipeline) * 4 * FLOAT


def _copies(config: Config, own: OneDevice) -> float:
    """Gradients of parameters that several devices of a replica hold are added up."""
    assert own.cuts
    total = 0.0
    for path, x in jax.tree_util.tree_flatten_with_path(trained.part(config, own.params))[0]:
        total += FLOAT * x.size * SENT["all-reduce"](own.cuts.copies(path))
        if not is_stacked(path):
            total += FLOAT * x.size * SENT["all-reduce"](config.parallel.pipeline)
    return total

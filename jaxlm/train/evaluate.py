"""The validation loss, exact whatever the number of devices: sums over all targets, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxlm.config import UserError
from jaxlm.data import Scored
from jaxlm.host.stop import NEVER, Interrupted, Stop
from jaxlm.model import Params


def evaluate(
    eval_step: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Scored],
    bytes_per_token: np.ndarray | None,
    stop: Stop = NEVER,
) -> dict[str, Any]:
    """Scores the parameters on the batches.

    If only some rows of a source are scored, its sums are scaled by (all rows) / (scored rows). The scores then
    estimate those of the whole validation set, in which every target weighs the same.

    Args:
      eval_step: from `train_step.pmap_eval_step`.
      batches: arrays `[local_devices, B, T]`; a target of -1 does not count.
      bytes_per_token: number of UTF-8 bytes that each token stands for, `[V]`; None if tokens are not text.

    Returns:
      `eval_loss` in nats per target token, `eval_perplexity`, `eval_bits_per_byte` (None if tokens are not text),
      `eval_accuracy`, `eval_tokens` (targets scored), and `eval_loss/<name>` for each source of a mixture (None if it
      has no target).

    Raises:
      UserError: the batches have no target.
      Interrupted: `stop` asked to stop.
    """
    table = np.zeros(0, np.int32) if bytes_per_token is None else bytes_per_token
    found: list[tuple[str, float, Any]] = []  # source, weight, sums
    for source, weight, batch in batches:
        if stop.now():
            raise Interrupted
        targets = batch["targets"]
        counted = np.where(targets >= 0, table[targets], 0) if table.size else np.zeros_like(targets)
        sums = eval_step(params, stop.tell(batch | {"bytes": counted.astype(np.float32)}))
        found.append((source, weight, sums))
        if len(found) > 2:
            stop.hear(jax.block_until_ready(found[-2][2]))  # so that batches do not pile up on the devices
    total = {k: sum(weight * float(sums[k]) for _, weight, sums in found) for k in found[0][2]}  # in float64
    if not total["targets"]:
        raise UserError(
            "the validation data has no target that counts towards the loss; allowed: more of it (data.val_fraction, "
            "data.val_path), or more eval.batches"
        )
    loss = total["nll"] / total["targets"]
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_bits_per_byte": total["nll"] / math.log(2) / total["bytes"] if total["bytes"] else None,
        "eval_accuracy": total["correct"] / total["targets"],
        "eval_tokens": int(sum(float(sums["targets"]) for _, _, sums in found)),
    } | {f"eval_loss/{name}": _loss(name, found) for name in dict.fromkeys(name for name, _, _ in found) if name}


def _loss(name: str, found: list[tuple[str, float, Any]]) -> float | None:
    """The loss of one source; None if it has no target."""
    nll, targets = (sum(float(sums[k]) for source, _, sums in found if source == name) for k in ("nll", "targets"))
    return nll / targets if targets else None

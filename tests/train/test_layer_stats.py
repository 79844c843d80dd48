"""Statistics of each layer, beside a loop over layers on one device: `jax.grad`, NumPy's model, and the parameters that
the step returns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Config
from jaxlm.model import lora
from jaxlm.train import layer_stats, trained
from tests import reference
from tests.decoders import logits_of
from tests.stepping import ADAMW, BATCHES, MUON, STEPS, VOCAB, built, make, make_config, split, whole_state

RTOL = 2e-5  # an update is known from rounded parameters
L = 3  # not the number of devices
THREE = [f"model.num_layers={L}", "log.every_steps=2"]
PLAIN = [*ADAMW, *THREE]
LORA = [*PLAIN, "model.lora_rank=3", "model.lora_alpha=5", "model.lora_targets=query|value|down"]
ALL_AT_ONCE = ["optim.accum_steps=2", "parallel.zero=1", "parallel.overlap=true", "model.remat=full"]


def run(config: Config, devices: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns the metrics of each step, and the parameters before the first and after each."""
    step, state = built(config, devices)
    metrics, params = [], [whole_state(config, devices, state).params]
    for batch in BATCHES[16]:
        state, m = step(state, split(batch, devices))
        metrics.append(jax.device_get(m))
        params.append(whole_state(config, devices, state).params)
    return metrics, params


def norms(tree: Any) -> dict[str, Any]:
    """The norm of each part of a tree that has arrays; of the layers, a list."""

    def norm(arrays: list[Any]) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays)))

    parts = {part: jax.tree.leaves(tree[part]) for part in tree}
    return {
        part: [norm([x[i] for x in arrays]) for i in range(L)] if part == "layers" else norm(arrays)
        for part, arrays in parts.items()
        if arrays
    }


def gradients(config: Config, params: list[Any]) -> list[Any]:
    """The gradient of each step, of the mean loss of the whole batch."""
    model = make(config)

    def loss(own: Any, frozen: Any, batch: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits_of(model)(trained.joined(frozen, own), batch["inputs"]))
        nll = -jnp.sum(log_probs * jax.nn.one_hot(batch["targets"], VOCAB), axis=-1)
        return jnp.sum(nll) / jnp.sum(batch["targets"] >= 0)

    grad, found = jax.jit(jax.grad(loss)), []
    for before, batch in zip(params, BATCHES[16], strict=False):
        own = trained.part(config, before)
        found.append(jax.device_get(grad(own, trained.without(before, own), batch)))
    return found


def activations(config: Config, params: Any, batch: Any) -> list[float]:
    merged = lora.merged(config.model, params) if config.model.lora_rank else params
    behind: list[list[np.ndarray]] = [[] for _ in batch["inputs"]]
    for row, found in zip(batch["inputs"], behind, strict=True):
        reference.logits(config.model, merged, row, found)
    return [float(np.sqrt(np.mean(np.square(layer)))) for layer in zip(*behind, strict=True)]


@pytest.mark.parametrize(
    ("keys", "devices", "more"),
    [
        (PLAIN, 8, []),
        (PLAIN, 2, ALL_AT_ONCE),
        (LORA, 2, ["optim.accum_steps=4", "parallel.overlap=true"]),
        (LORA, 8, ["parallel.zero=3"]),
        ([*MUON, *THREE], 2, ["parallel.zero=1"]),
        ([*PLAIN, "optim.freeze=layers"], 2, []),
    ],
)
def test_the_numbers_are_those_of_a_loop_over_layers(keys: list[str], devices: int, more: list[str]):
    config = make_config(*keys, *more, "log.layer_stats=true")
    metrics, params = run(config, devices)
    for i, grads in enumerate(gradients(make_config(*keys), params)):
        before, after = (trained.part(config, p) for p in params[i : i + 2])
        updates, weights = norms(jax.tree.map(np.subtract, after, before)), norms(before)
        want: dict[str, Any] = {f"{part}/grad_norm": x for part, x in norms(grads).items()}
        want |= {f"{part}/update_ratio": np.divide(x, weights[part]).tolist() for part, x in updates.items()}
        want["layers/activation_rms"] = activations(config, params[i], BATCHES[16][i])
        got = layer_stats.numbers(metrics[i])
        assert got.keys() == want.keys()
        for key, x in want.items():
            np.testing.assert_allclose(got[key], x, rtol=RTOL, err_msg=key)
        assert len(set(want["layers/activation_rms"])) == L


@pytest.mark.ci  # compares two programs, which other code may round differently (tests/conftest.py)
@pytest.mark.parametrize("more", [[], ALL_AT_ONCE])
def test_a_step_without_them_has_the_same_parameters_bit_for_bit(more: list[str]):
    metrics, params = run(make_config(*PLAIN, *more), 2)
    with_stats, same = run(make_config(*PLAIN, *more, "log.layer_stats=true"), 2)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert [{k: x for k, x in m.items() if "/" not in k} for m in with_stats] == metrics
    assert len(metrics) == STEPS and not any("/" in key for m in metrics for key in m)


def test_a_step_that_is_left_out_has_no_update():
    step, state = built(make_config(*PLAIN, "log.layer_stats=true"), 8)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params["final_norm"])
    _, m = step(state._replace(params=state.params | {"final_norm": bad}), split(BATCHES[16][0], 8))
    got = layer_stats.numbers(jax.device_get(m))
    assert got["layers/update_ratio"] == [0.0] * L and not np.isfinite(got["layers/grad_norm"]).any()
    assert np.isfinite(got["layers/activation_rms"]).all()

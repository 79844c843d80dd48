"""Training of some parameters: LoRA and `optim.freeze`, beside plain `jax.grad` of these parameters on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import Config, UserError
from jaxlm.model import lora, num_params
from jaxlm.train import step as train_step
from jaxlm.train import trained
from tests.decoders import logits_of
from tests.stepping import (
    ADAMW,
    BATCHES,
    RTOL,
    VOCAB,
    Result,
    built,
    gap,
    make,
    make_config,
    run_pmap,
    split,
    whole_state,
)

LORA = [*ADAMW, "model.lora_rank=3", "model.lora_alpha=5", "model.lora_targets=query|value|down"]
FREEZE = [*ADAMW, "optim.freeze=embed|norm|mlp/up"]


def names(tree: Any) -> set[str]:
    return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def reference(config: Config, batches: list[train_step.Batch]) -> Result:
    """Steps on one device: gradient, clipping and AdamW of a flat dict of the trained arrays."""
    model, c = make(config), config.optim
    paths, tree = jax.tree_util.tree_flatten_with_path(built(config, 1)[1].params)
    flat: dict[str, Any] = {jax.tree_util.keystr(path): x for path, x in paths}
    own = {k for k, (path, _) in zip(flat, paths, strict=True) if trained.trains(config, "/".join(p.key for p in path))}

    def loss(some: dict[str, jax.Array], batch: train_step.Batch) -> jax.Array:
        params = jax.tree.unflatten(tree, list((flat | some).values()))
        log_probs = jax.nn.log_softmax(logits_of(model)(params, batch["inputs"]))
        nll = -jnp.sum(log_probs * jax.nn.one_hot(batch["targets"], VOCAB), axis=-1)
        return jnp.sum(nll) / jnp.sum(batch["targets"] >= 0)

    schedule = optax.linear_schedule(c.lr / 2, c.lr, 1)
    decays = {k: k.split("'")[-2] in ("kernel", "embedding", lora.A, lora.B) for k in own}
    adam = optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays)
    chain = optax.chain(optax.clip_by_global_norm(c.clip_norm), adam)
    params: Any = {k: x for k, x in flat.items() if k in own}
    state, losses, norms = chain.init(params), [], []
    for batch in batches:
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
        norms.append(float(optax.tree.norm(grads)))
    return Result(losses, norms, jax.tree.unflatten(tree, list((flat | params).values())), None)


@pytest.mark.parametrize(
    ("keys", "devices", "more"),
    [
        pytest.param(LORA, 8, [], marks=pytest.mark.ci),
        (LORA, 2, ["optim.accum_steps=4", "parallel.zero=1", "parallel.overlap=true"]),
        (LORA, 8, ["optim.accum_steps=2", "parallel.zero=3"]),
        pytest.param(FREEZE, 2, ["optim.accum_steps=2", "parallel.overlap=true"], marks=pytest.mark.ci),
        (FREEZE, 8, ["parallel.zero=1"]),
        (FREEZE, 2, ["parallel.zero=3"]),
        ([*ADAMW, "optim.freeze=layers"], 2, ["parallel.overlap=true"]),
    ],
)
def test_steps_are_those_of_plain_gradients(keys: list[str], devices: int, more: list[str]) -> None:
    config = make_config(*keys, *more)
    want, got = reference(make_config(*keys), BATCHES[16]), run_pmap(config, devices, BATCHES[16])
    np.testing.assert_allclose(got.losses, want.losses, rtol=RTOL)
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=RTOL)
    assert gap(got.params, want.params) < RTOL
    before = whole_state(config, devices, built(config, devices)[1]).params
    own = trained.part(config, before)
    jax.tree.map(
        np.testing.assert_array_equal, trained.without(got.params, own), jax.device_get(trained.without(before, own))
    )
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), trained.part(config, got.params), own)
    assert all(jax.tree.leaves(moved)) and got.losses[-1] != got.losses[0]


def test_the_state_holds_only_what_is_trained() -> None:
    config = make_config(*LORA, "optim.ema_decay=0.9", "parallel.reduce=topk")
    state = train_step.init_state(config, make(config), 2)
    own = {f"layers/{layer}/lora_{x}" for layer in ("attention/query", "attention/value", "mlp/down") for x in "ab"}
    assert names(trained.part(config, state.params)) == own == names(state.ema)
    moments: Any = state.opt_state
    assert names(moments[0].mu) == names(moments[0].nu) == own
    assert {name.rpartition("/")[0] for name in names(state.sync)} <= own
    assert names(state.params) - own == names(train_step.init_params(make_config(*ADAMW), make(make_config(*ADAMW))))


def test_lora_parameters_stay_in_float32_beside_weights_in_bfloat16() -> None:
    config = make_config(*LORA, "model.param_dtype=bfloat16", "model.dtype=bfloat16")
    got = run_pmap(config, 2, BATCHES[16])
    dtypes = {name: x.dtype for name, x in trained.part(config, got.params)["layers"]["mlp"]["down"].items()}
    assert set(dtypes.values()) == {np.dtype("float32")} and got.params["embed"]["embedding"].dtype == "bfloat16"
    assert got.losses[-1] != got.losses[0]


def test_a_merged_model_computes_the_same() -> None:
    config = make_config(*LORA)
    params = jax.device_get(built(config, 2)[1].params)
    tokens = BATCHES[16][0]["inputs"]
    plain = make_config(*ADAMW)
    merged = lora.merged(config.model, params)
    assert names(merged) == names(params) - names(trained.part(config, params))
    want = logits_of(make(config))(params, tokens)
    np.testing.assert_allclose(logits_of(make(plain))(merged, tokens), want, rtol=1e-5, atol=1e-5)
    without = logits_of(make(plain))(lora.without(params), tokens)
    assert np.abs(np.asarray(without - want)).max() > 0.1


def test_dropout_of_lora_does_not_depend_on_the_devices() -> None:
    runs = [run_pmap(make_config(*LORA, f"model.lora_dropout={rate}"), n, BATCHES[16]) for rate, n in
            ((0.5, 2), (0.5, 8), (0.0, 8))]  # fmt: skip
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=RTOL)
    assert np.abs(np.array(runs[0].losses) - runs[2].losses).max() > 1e-3


def test_dropout_drops_only_what_lora_reads() -> None:
    """With matrices B of zeros, LoRA adds nothing, so that its dropout has no effect either."""
    config = make_config(*LORA, "model.lora_dropout=0.5")
    step, state = built(config, 2)
    zeros = jax.tree_util.tree_map_with_path(lambda p, x: x * 0 if p[-1].key == lora.B else x, state.params)
    loss = step(state._replace(params=zeros), split(BATCHES[16][0], 2))[1]["loss"]
    plain = make_config(*LORA)
    step, state = built(plain, 2)
    zeros = jax.tree_util.tree_map_with_path(lambda p, x: x * 0 if p[-1].key == lora.B else x, state.params)
    assert float(loss) == pytest.approx(float(step(state._replace(params=zeros), split(BATCHES[16][0], 2))[1]["loss"]))


def test_flops_leave_out_gradients_of_frozen_weights() -> None:
    config = make_config(*LORA)
    params = make(config).shapes()
    own, plain = trained.part(config, params), make_config(*ADAMW)
    base = make(plain).shapes()
    tables = num_params(base["embed"]) * (not config.model.tie_embeddings)
    whole = trained.flops_per_token(plain, base)
    want = whole - 2 * (num_params(base) - tables) + 6 * num_params(own)
    assert trained.flops_per_token(config, params) == want


@pytest.mark.parametrize(("pattern", "found"), [("nothing like it", "none"), (".", "all")])
def test_a_pattern_that_freezes_none_or_all_is_refused(pattern: str, found: str) -> None:
    config = make_config(f"optim.freeze={pattern}")
    with pytest.raises(UserError, match=f"optim.freeze is '{pattern}', which matches {found}"):
        trained.check(config, make(config).shapes())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.lora_rank=65"], "model.lora_rank is 65; allowed: at most"),
        (["model.lora_rank=2", "model.lora_alpha=0"], "model.lora_alpha is 0"),
        (["model.lora_rank=2", "model.lora_targets=q_proj"], "model.lora_targets is 'q_proj'; allowed: .* query, key"),
        (["model.lora_rank=2", "model.lora_targets=("], r"model.lora_targets is '\('"),
        (["model.lora_rank=2", "model.lora_dropout=1"], "model.lora_dropout is 1.0"),
        (["optim.freeze=("], r"optim.freeze is '\('; allowed: a regular expression"),
    ],
)
def test_wrong_values_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*keys)

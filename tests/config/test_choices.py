"""Each value of a key with choices has an entry in the key's table, so a new value never behaves like an old one."""

from collections.abc import Collection
from typing import Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import pytest

from jaxlm.config import OF_WHOLE_GRADIENTS, SOURCES, WITHOUT_PARTS, key_types
from jaxlm.config.files import BASE, load
from jaxlm.config.own_values import OWN_VALUES, PEAKS
from jaxlm.data.sources.opening import IDS, TEXTS
from jaxlm.data.tokenizers.loading import TOKENIZERS
from jaxlm.model.layers import ACTIVATIONS, NORMS, RESIDUAL_INITS
from jaxlm.model.remat import REMAT
from jaxlm.sync import REDUCTIONS, Group
from jaxlm.train.optimizer import OPTIMIZERS
from jaxlm.train.schedule_table import FIRST_BACKWARD
from jaxlm.train.schedules import SCHEDULES

TABLES: dict[str, list[Collection[str]]] = {
    "data.source": [SOURCES, [*TEXTS, *IDS]],
    "data.tokenizer": [TOKENIZERS],
    "model.activation": [ACTIVATIONS],
    "model.norm": [NORMS],
    "model.remat": [["auto", "none", *REMAT]],
    "model.residual_init": [RESIDUAL_INITS],
    "optim.name": [OPTIMIZERS, OWN_VALUES, PEAKS],
    "optim.schedule": [SCHEDULES],
    "parallel.reduce": [REDUCTIONS],
    "parallel.schedule": [FIRST_BACKWARD],
}
# Code branches on these keys, and the type checker or the code itself finds a value without a branch.
BRANCHES = {"model.attention", "model.position", "model.rope_scaling", "data.packing", "optim.on_spike"}
# JAX or sentencepiece gets the value, and refuses an unknown one.
PASSED_ON = {"model.dtype", "model.param_dtype", "data.sentencepiece"}
# The code compares these keys with single values, and all other values share the remaining branch.
SWITCHES = {"model.matmul_precision", "data.on_error"}


@pytest.mark.parametrize("key", TABLES)
def test_each_value_has_an_entry(key: str):
    for table in TABLES[key]:
        assert sorted(table) == sorted(get_args(key_types()[key]))


def test_every_key_with_choices_is_accounted_for():
    choices = {key for key, kind in key_types().items() if get_origin(kind) is Literal}
    assert choices == TABLES.keys() | BRANCHES | PASSED_ON | SWITCHES


def test_reductions_without_parts_are_refused_with_zero():
    """`validate` knows them by name, since config imports no other room."""
    config, group = load(BASE).parallel, Group("devices", 2)
    without = {name for name, make in REDUCTIONS.items() if make(group, config).mean_parts is None}
    assert without == set(WITHOUT_PARTS)
    array = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)
    keeps = {name for name, make in REDUCTIONS.items() if jax.eval_shape(make(group, config).init, array)}
    assert keeps == set(OF_WHOLE_GRADIENTS) | set(WITHOUT_PARTS)


def test_the_schema_marks_the_sources_of_token_ids():
    assert {name for name, kind in SOURCES.items() if kind.ids} == IDS.keys()

"""The search for grids: what it estimates beside what is compiled, and what it finds where memory is short."""

import dataclasses

import pytest

from jaxlm.config import Config
from jaxlm.config.files import BASE, load
from jaxlm.config.validate import validate
from jaxlm.host.runtime import GPU_MEMORY
from jaxlm.plan.devices import DEVICES
from jaxlm.plan.grids import MARGIN, Estimate, Search, divisors
from jaxlm.plan.planning import make_plan
from jaxlm.plan.samples import sample

VOCAB = 512
H100 = DEVICES["H100"]
SMALL = H100._replace(per_host=4)  # as many as are simulated here
KEYS = [
    "data.source=synthetic",
    f"data.vocab_size={VOCAB}",
    "model.num_layers=6",
    "model.d_model=1024",
    "model.num_heads=8",
    "model.dtype=bfloat16",
    "model.scan_unroll=1",
    "seq_len=512",
    "batch_size=32",
    "optim.name=adamw",
]


def make_config(*more: str) -> Config:
    return load(BASE, [f"--config.{key}" for key in (*KEYS, *more)])


@pytest.fixture(scope="module")
def searching() -> Search:
    return Search(make_config(), SMALL, 8, VOCAB)


@pytest.fixture(scope="module")
def found(searching: Search) -> list[Estimate]:
    return searching.best()


def test_every_way_is_allowed_and_fits(found: list[Estimate]):
    assert len({str(e.changes(make_config())) for e in found}) == len(found) > 10
    for e in found:
        p = e.config.parallel
        validate(e.config)
        assert e.devices % p.of_a_replica == 0 and e.devices in (1, 2, 3, 4, 8)
        assert e.config.batch_size % (e.devices // p.of_a_replica * e.config.optim.accum_steps) == 0
        assert 0 < e.total <= MARGIN * GPU_MEMORY * SMALL.memory
        assert ("bubble" in e.seconds) == (p.pipeline > 1) == ("pipeline" in e.sent)
        assert ("tensor" in e.sent) == (p.tensor > 1)
    assert [e.score for e in found] == sorted(e.score for e in found)
    best = found[0].config.parallel
    assert (best.tensor, best.pipeline, best.context) == (1, 1, 1), "a small model is fastest with data alone"


@pytest.mark.parametrize(
    "grid", [{"zero": 0}, {"zero": 3}, {"tensor": 2, "zero": 1}, {"pipeline": 2}], ids=lambda g: "-".join(g)
)
def test_estimates_are_near_the_compiled_step(found: list[Estimate], grid: dict[str, int]):
    """The time within a third: the programs are for CPUs here, which do not take a fourth of the time for a fourth of a
    row, and hold more beside; tests/gpu/test_gpu_compile.py compares all for GPUs.
    """
    want = {"tensor": 1, "pipeline": 1, "context": 1, "zero": 0} | grid
    ours = [e for e in found if all(getattr(e.config.parallel, k) == v for k, v in want.items())]
    e = ours[0]
    plan = make_plan(e.config, SMALL, e.devices, VOCAB)
    assert e.time == pytest.approx(plan.time.seconds, rel=0.35)
    replicas_alone = e.config.parallel.of_a_replica == 1  # otherwise devices keep a little more than their share
    for name in ("parameters", "optimizer", "gradients", *["kept"] * replicas_alone):
        assert e.memory[name] == pytest.approx(getattr(plan.memory, name), rel=0.02), name


def test_with_less_memory_devices_share_the_state(found: list[Estimate], searching: Search):
    whole = next(e for e in found if not e.config.parallel.zero and not e.config.parallel.splits_model)
    state = sum(whole.memory[name] for name in ("parameters", "optimizer", "gradients"))
    searching.device = SMALL._replace(memory=0.9 * state / GPU_MEMORY)
    fewer = searching.best()
    assert 0 < len(fewer) < len(found)
    assert all(e.config.parallel.zero or e.config.parallel.splits_model for e in fewer)
    searching.device = SMALL._replace(memory=1e6)
    assert searching.best() == []


def test_samples_give_the_time_of_more_layers_and_sequences():
    config = make_config("model.remat=full")
    found = sample(config, SMALL, VOCAB, "full", context=False)
    more = dataclasses.replace(
        config,
        batch_size=4,
        model=dataclasses.replace(config.model, num_layers=8),
        parallel=dataclasses.replace(config.parallel, zero=0),
    )
    plan = make_plan(more, SMALL, 1, VOCAB)
    s = found.seconds
    assert s.fixed + s.layer * 8 + s.row * 4 + s.layer_row * 32 == pytest.approx(plan.time.computation, rel=0.05)
    k = found.kept
    assert k.row * 4 + k.layer_row * 32 == pytest.approx(plan.memory.kept, rel=0.01)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1]

"""Counts what programs with known numbers read, write, multiply and exchange."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.plan.devices import DEVICES, LATENCY, NETWORK
from jaxlm.plan.kernels import kernel_of, moved, products, walk
from jaxlm.plan.program import Program, bytes_of, parse
from jaxlm.plan.times import exchange_seconds, step_time
from jaxlm.train.one_device import RUNS

H100 = DEVICES["H100"]

LOOP = """HloModule step

FileNames
1 "/somewhere/jaxlm/model/layers.py"
2 "/elsewhere/flax/core.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=69 end_line=69 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%kept (param_0: bf16[12,64,32], param_1: s32[], param_2: bf16[64,32]) -> bf16[12,64,32] {
  %param_0 = bf16[12,64,32]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %param_2 = bf16[64,32]{1,0} parameter(2)
  %bitcast.1 = bf16[1,64,32]{2,1,0} bitcast(%param_2)
  %constant.1 = s32[] constant(0)
  ROOT %update = bf16[12,64,32]{2,1,0} dynamic-update-slice(%param_0, %bitcast.1, %param_1, %constant.1, %constant.1)
}

%product (param_0.1: bf16[64,32], param_1.1: bf16[32,16]) -> f32[64,16] {
  %param_0.1 = bf16[64,32]{1,0} parameter(0)
  %param_1.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%param_0.1, %param_1.1), lhs_contracting_dims={1}, METADATA
}

%body (state: STATE) -> STATE {
  %state = STATE parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %stack = bf16[12,64,32]{2,1,0} get-tuple-element(%state), index=2
  %w = bf16[32,16]{1,0} get-tuple-element(%state), index=3
  %g = f32[64,16]{1,0} get-tuple-element(%state), index=4
  %keep = bf16[12,64,32]{2,1,0} fusion(%stack, %i, %x), kind=kLoop, calls=%kept
  %all-reduce-start = f32[64,16]{1,0} all-reduce-start(%g), channel_id=1, GROUPS
  %y = f32[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%product
  %all-reduce-done = f32[64,16]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %next = STATE tuple(%i, %x, %keep, %w, %y)
}

ENTRY %main (p: STATE) -> STATE {
  %p = STATE parameter(0)
  ROOT %loop = STATE while(%p), condition=%always, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""
for name, text in {
    "STATE": "(s32[], bf16[64,32]{1,0}, bf16[12,64,32]{2,1,0}, bf16[32,16]{1,0}, f32[64,16]{1,0})",
    "METADATA": 'metadata={op_name="jit(step)/mlp/dot_general" stack_frame_id=2}',
    "GROUPS": 'replica_groups=[1,8]<=[8], metadata={op_name="jit(step)/transpose(jvp(reduce_gradients))/psum"}',
}.items():
    LOOP = LOOP.replace(name, text)
ROW, WEIGHTS, RESULT = 64 * 32 * 2, 32 * 16 * 2, 64 * 16 * 4  # bytes


def test_a_loop_runs_as_often_as_it_says():
    program = parse(LOOP)
    steps = {s.instruction.name: s for s in walk(program)}
    assert list(steps) == ["keep", "all-reduce-start", "y", "all-reduce-done"]
    assert all(s.times == 12 and s.looped for s in steps.values())
    found = {name: kernel_of(program, steps[name]) for name in ("keep", "y")}
    assert (
        found["keep"].bytes == 2 * ROW + 4
    )  # with its index; the update is read and written, the stack stays where it is
    assert found["y"].bytes == ROW + WEIGHTS + RESULT and found["y"].flops == 2 * 64 * 32 * 16
    assert found["y"].op_name == "jit(step)/mlp/dot_general"
    assert found["y"].source == "jaxlm/model/layers.py:69"  # the line of this package, not the library's that it calls


def test_an_exchange_is_hidden_by_the_kernels_beside_it():
    time = step_time(parse(LOOP), H100, 8, H100.flops)
    (exchange,) = time.exchanges
    seconds = {kernel.name: s for kernel, s in time.kernels}
    assert exchange.collective.times == 12 and exchange.collective.where == "loop of the backward pass"
    assert exchange.kernels == 1 and exchange.beside == pytest.approx(seconds["y"], rel=1e-12)
    assert seconds["y"] == max((ROW + WEIGHTS + RESULT) / H100.bandwidth, 2 * 64 * 32 * 16 / 800e12)
    hidden = exchange._replace(seconds=exchange.beside / 2)
    assert exchange.exposed == pytest.approx(exchange.seconds - exchange.beside) and hidden.exposed == 0
    assert time.seconds == pytest.approx(12 * (seconds["keep"] + seconds["y"] + exchange.exposed))


def test_exchanges_take_a_ring_in_a_host_and_a_tree_between_hosts():
    (exchange,) = step_time(parse(LOOP), H100, 8, H100.flops).exchanges
    c = exchange.collective._replace(bytes=8e9)
    in_host = 2 * 7 / 8 * 8e9 / H100.link + 2 * 7 * LATENCY["link"]
    assert exchange_seconds(c, H100, 8) == pytest.approx(in_host)
    over_hosts = 2 * 31 / 32 * 8e9 / (8 * NETWORK) + 2 * (7 * LATENCY["link"] + 2 * LATENCY["network"])
    assert exchange_seconds(c, H100, 32) == pytest.approx(over_hosts)
    gather = c._replace(kind="all-gather")
    assert exchange_seconds(gather, H100, 8) == pytest.approx(in_host / 2)
    assert exchange_seconds(c, H100, 1) == 0


def compiled(f: Any, *shapes: Any) -> Program:
    text = jax.jit(f).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compile().as_text()
    return parse(text or "")


PARTS = """HloModule parts

%sliced (param_0: f32[2,8,30]) -> f32[8,10] {
  %param_0 = f32[2,8,30]{2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[8,30]{1,0} reduce(%param_0, %zero), dimensions={0}, to_apply=%add
  ROOT %slice = f32[8,10]{1,0} slice(%sum), slice={[0:8], [10:20]}
}

%scattered (param_0.1: f32[500,8], param_1.1: s32[6,1], param_2.1: bf16[6,1,8]) -> f32[500,8] {
  %param_0.1 = f32[500,8]{1,0} parameter(0)
  %param_1.1 = s32[6,1]{1,0} parameter(1)
  %param_2.1 = bf16[6,1,8]{2,1,0} parameter(2)
  %rows = f32[6,1,8]{2,1,0} convert(%param_2.1)
  ROOT %scatter = f32[500,8]{1,0} scatter(%param_0.1, %param_1.1, %rows), update_window_dims={1,2}, to_apply=%add
}

ENTRY %main (p.0: f32[2,8,30], p.1: f32[500,8], p.2: s32[6,1], p.3: bf16[6,1,8]) -> (f32[8,10], f32[500,8]) {
  %p.0 = f32[2,8,30]{2,1,0} parameter(0)
  %p.1 = f32[500,8]{1,0} parameter(1)
  %p.2 = s32[6,1]{1,0} parameter(2)
  %p.3 = bf16[6,1,8]{2,1,0} parameter(3)
  %a = f32[8,10]{1,0} fusion(%p.0), kind=kLoop, calls=%sliced
  %b = f32[500,8]{1,0} fusion(%p.1, %p.2, %p.3), kind=kInput, calls=%scattered
  ROOT %both = (f32[8,10]{1,0}, f32[500,8]{1,0}) tuple(%a, %b)
}
"""


def test_a_kernel_reads_what_its_result_needs():
    """The third of two sums that a slice takes; of an array with sums in six rows, those rows, in and out."""
    program = parse(PARTS)
    a, b = (moved(program, step.instruction, step.shapes) for step in walk(program))
    assert a == 4 * (2 * 8 * 10 + 8 * 10)
    assert b == 2 * 4 * 6 * 8 + 2 * 6 * 8 + 4 * 6


def test_products_and_traffic_of_what_jax_compiles_here():
    """A product in a loop, whose operand is sliced, and an elementwise pass."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(f, (256, 256), (5, 256, 256))
    flops = sum(s.times * products(program, s.instruction, s.shapes) for s in walk(program))
    assert flops == 5 * 2 * 256**3
    total = sum(s.times * moved(program, s.instruction, s.shapes) for s in walk(program))
    array = 4 * 256**2
    # Each iteration reads and writes x twice and reads its slice of w; copies of w's slice or of x may come on top.
    assert 5 * 5 * array <= total <= 5 * 9 * array


def test_a_loop_of_unknown_length_is_an_error():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x), (8,))
    with pytest.raises(ValueError, match="unknown number of iterations"):
        list(walk(program))


def test_sizes_of_shapes():
    assert bytes_of("(bf16[2,3]{1,0}, pred[5], s4[8]{0}, f32[])") == 12 + 5 + 4 + 4


def test_a_conditional_runs_as_often_as_its_name_says():
    """In a loop of seven iterations, a product that three of them need."""

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            with jax.named_scope(f"{RUNS}3"):
                return jax.lax.cond(i % 2 > 0, lambda x: x @ x, jnp.sin, x), None

        return jax.lax.scan(body, x, jnp.arange(7))[0]

    found = parse(program.lower(jnp.ones((32, 32))).compile().as_text() or "")
    kernels = [kernel_of(found, step) for step in walk(found)]
    assert sum(k.times * k.flops for k in kernels) == 3 * 2 * 32**3

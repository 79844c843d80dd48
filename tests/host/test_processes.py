"""Two processes with two devices each, joined over TCP, train as one run on four devices."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.checkpoint.reading import Checkpoints
from tests.processes import LIMIT, finish, flags, free_port, numbers, start
from tests.runs import CONFIG, ROOT, lines, xla_flags


def params(workdir: Path, step: int) -> Any:
    checkpoints = Checkpoints(workdir)
    found = checkpoints.restore_params(step)
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """Returns the workdir and the results of a run of two processes that is never stopped."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, finish(start(workdir, 2, "steps=40"))


@pytest.mark.slow
def test_two_processes_are_one_run(two: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path):
    workdir, results = two
    assert [code for code, *_ in results] == [0, 0], results
    assert "4 x cpu" in results[0][1] and "step" in results[0][1]
    # The second process prints nothing itself, but Gloo prints lines about its connections, which may be interleaved.
    assert "cpu" not in results[1][1] and "step" not in results[1][1]
    assert [error for *_, error in results] == ["", ""]
    assert [code for code, *_ in finish(start(tmp_path / "run", 1, "steps=40"))] == [0]
    one = numbers(tmp_path / "run")
    # Only the first process writes, so no line appears twice.
    assert [(m["step"], "loss" in m) for m in numbers(workdir)] == [(m["step"], "loss" in m) for m in one]
    for a, b in zip(numbers(workdir), one, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert one[0]["loss"] - one[-2]["loss"] > 0.01  # the loss falls, so equal losses mean something

    def check(a: Any, b: Any) -> None:
        for key in b:
            if isinstance(b[key], dict):
                check(a[key], b[key])
            else:
                np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-5 * np.abs(b[key]).max(), err_msg=key)

    for step in (0, 20, 40):
        check(params(workdir, step), params(tmp_path / "run", step))


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, parallel",
    [
        pytest.param(4, ["parallel.zero=3"], marks=pytest.mark.ci),
        (2, ["parallel.pipeline=2", "parallel.tensor=2"]),
    ],
)
def test_processes_that_hold_parts_are_the_same_run(
    processes: int, parallel: list[str], two: tuple[Path, Any], tmp_path: Path
):
    """Each holds a quarter of the parameters, or a stage of the pipeline."""
    results = finish(start(tmp_path / "run", processes, "steps=20", *parallel))
    assert [code for code, *_ in results] == [0] * processes, results
    found = numbers(tmp_path / "run")
    assert found[-1]["step"] == 20
    for a, b in zip(found, numbers(two[0]), strict=False):
        assert a == pytest.approx(b, rel=1e-5)
    a, b = (jax.tree.leaves(params(workdir, 20)) for workdir in (tmp_path / "run", two[0]))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.slow
def test_sigterm_stops_both_at_the_same_step_and_both_resume(
    two: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path
):
    """Both stop after the same step, and resume with the losses of the run that is never stopped, bit for bit."""
    workdir = tmp_path / "run"
    long = start(workdir, 2, "steps=100000", "checkpoint.every_steps=100000", "eval.every_steps=0")
    deadline = time.monotonic() + LIMIT
    try:
        while not any(m["step"] >= 5 for m in lines(workdir)):
            assert all(p.poll() is None for p in long) and time.monotonic() < deadline, finish(long)
            time.sleep(0.002)
        for p in long:
            p.send_signal(signal.SIGTERM)
    finally:
        results = finish(long)
    assert [code for code, *_ in results] == [75, 75], results
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert f"stopped after step {stopped}," in results[0][1]

    more = f"steps={stopped + 20}"
    again = finish(start(workdir, 2, more, "checkpoint.every_steps=100000", "eval.every_steps=0"))
    assert [code for code, *_ in again] == [0, 0], again
    assert f"resumes after step {stopped}" in again[0][1]
    steps = [m["step"] for m in lines(workdir) if "loss" in m]
    assert steps == sorted({1, *range(5, stopped + 21, 5), stopped + 20})
    reference, found = ({m["step"]: m["loss"] for m in numbers(w) if "loss" in m} for w in (two[0], workdir))
    common = [step for step in found if step in reference]
    assert len(common) >= 3
    assert [found[s] for s in common] == [reference[s] for s in common]
    if stopped < 40:
        assert any(step > stopped for step in common)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_before_the_first_step_ends_both(asked: int, tmp_path: Path):
    """Neither process waits for the other in a collective, or for a compilation to finish."""
    both = start(tmp_path / "run", 2, "steps=100000", program=["-m", "tests.compiles_long"])
    try:
        said = both[asked].stderr
        assert said
        while "compiling" not in (line := said.readline()):
            assert line, finish(both)
        both[asked].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        for p in both:
            p.wait(30)
        seconds = time.monotonic() - sent
    finally:
        results = finish(both)
    assert [code for code, *_ in results] == [75, 75], results
    assert "jaxlm: stopped before the first step; run the same command again" in results[asked][2]
    assert f"(process {asked}) has ended with exit code 75: a signal; this host stops too" in results[1 - asked][2]
    assert seconds < 15 and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.ci
@pytest.mark.slow
def test_sigterm_to_one_cuts_an_evaluation_short_on_both(tmp_path: Path):
    """The evaluation would take minutes. When the processes resume, they do it before the next step."""
    np.save(tmp_path / "train.npy", np.zeros(1000, np.uint16))
    np.save(tmp_path / "val.npy", np.zeros(20_000_000, np.uint16))
    keys = ["data.source=tokens", f"data.path={tmp_path / 'train.npy'}", f"data.val_path={tmp_path / 'val.npy'}",
            "data.vocab_size=64", "eval.every_steps=1", "steps=2"]  # fmt: skip
    workdir = tmp_path / "run"
    both = start(workdir, 2, *keys, "eval.batches=0")
    deadline = time.monotonic() + LIMIT
    try:
        while not lines(workdir):
            assert all(p.poll() is None for p in both) and time.monotonic() < deadline, finish(both)
            time.sleep(0.002)
        time.sleep(0.3)  # until the other process knows of the step
        both[1].send_signal(signal.SIGTERM)
    finally:
        results = finish(both)
    assert [code for code, *_ in results] == [75, 75], results
    assert "stopped after step 1," in results[0][1]
    assert [(m["step"], "loss" in m) for m in lines(workdir)] == [(1, True)]
    again = finish(start(workdir, 2, *keys, "eval.batches=2"))
    assert [code for code, *_ in again] == [0, 0], again
    assert [(m["step"], "loss" in m) for m in lines(workdir)] == [(1, True), (1, False), (2, True), (2, False)]


@pytest.mark.ci
@pytest.mark.slow
def test_other_runs_start_from_the_weights_of_two_processes(two: tuple[Path, Any], tmp_path: Path):
    """Two processes start from the weights, and so does one with as many devices; `params` above uses other devices."""
    want = params(two[0], 40)
    for processes in (2, 1):
        workdir = tmp_path / f"run{processes}"
        results = finish(
            start(workdir, processes, "steps=1", f"checkpoint.resume={two[0]}", "checkpoint.every_steps=0")
        )
        assert [code for code, *_ in results] == [0] * processes, results
        assert "starts from the weights of step 40" in results[0][1]
        found = params(workdir, 0)
        np.testing.assert_array_equal(found["embed"]["embedding"], want["embed"]["embedding"])


@pytest.mark.slow
def test_a_wrong_configuration_ends_both_with_2(tmp_path: Path):
    results = finish(
        start(tmp_path / "run", 2, "steps=40", "batch_size=12", "optim.accum_steps=1", "parallel.devices=3")
    )
    assert [code for code, *_ in results] == [2, 2]
    assert all("parallel.devices" in error and "Traceback" not in error for *_, error in results)
    assert not (tmp_path / "run").exists()


LONG = ["steps=100000", "checkpoint.every_steps=100000", "eval.every_steps=0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", [pytest.param(1, id="another", marks=pytest.mark.ci), pytest.param(0, id="the-coordinator")]
)
def test_a_host_that_dies_ends_the_others(victim: int, tmp_path: Path):
    """The other host ends within 45 seconds with a last line that names the dead host, and the run can start again."""
    workdir = tmp_path / "run"
    started = start(workdir, 2, *LONG)
    deadline = time.monotonic() + LIMIT
    while not any(m["step"] >= 5 for m in lines(workdir)):
        assert all(p.poll() is None for p in started) and time.monotonic() < deadline, finish(started)
        time.sleep(0.01)
    started[victim].kill()
    killed = time.monotonic()
    results = finish(started)
    assert time.monotonic() - killed < 45
    code, _, error = results[1 - victim]
    last = error.strip().split("\n")[-1]
    assert code == 5, results
    assert last.startswith(f"jaxlm: host {socket.gethostname()} (process {victim})") and "is gone" in last
    assert last.endswith("this host stops too; run the same command to resume")
    if victim == 1:  # if the coordinator dies, JAX prints lines of its own
        assert error.strip() == last
        again = finish(start(workdir, 1, "steps=20", "checkpoint.every_steps=20", "eval.every_steps=0"))
        assert [code for code, *_ in again] == [0], again


@pytest.mark.ci
@pytest.mark.slow
def test_processes_return_to_the_same_checkpoint(
    two: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both processes skip the same batches; the losses until then are those of an undisturbed run."""
    monkeypatch.setenv("CHAOS", json.dumps({"nan": [14, 16]}))
    monkeypatch.setenv("CHAOS_LOG", str(tmp_path / "log"))
    keys = ["steps=25", "checkpoint.every_steps=10", "optim.max_skipped=3", "eval.every_steps=0"]
    results = finish(start(tmp_path / "run", 2, *keys, program=[str(ROOT / "tools/chaos_child.py")]))
    assert [code for code, *_ in results] == [0, 0], results
    returns = json.loads((tmp_path / "run/returns.json").read_text())
    assert [(r["to"], r["batches"]) for r in returns] == [(10, [14, 16])]
    undisturbed, found = ({m["step"]: m["loss"] for m in numbers(w) if "loss" in m} for w in (two[0], tmp_path / "run"))
    assert list(found) == [1, 5, 10, 15, 20, 25] and None not in found.values()
    assert [found[n] == undisturbed[n] for n in found] == [True] * 3 + [False] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, devices, words",
    [
        ({1: ["--max_minutes", "5"]}, None, ["--max_minutes is 5.0 on host", "(process 1) and None on host"]),
        ({1: ["--config.optim.lr=0.002"]}, None, ["optim.lr is 0.002 on host", "(process 1) and 0.003 on host"]),
        ({}, [2, 1], ["has 2 devices, and host", "(process 1) has 1"]),
    ],
    ids=["command-line", "configuration", "devices"],
)
def test_hosts_with_different_settings_are_refused(
    more: dict[int, list[str]], devices: Any, words: list[str], tmp_path: Path
):
    results = finish(start(tmp_path / "run", 2, "steps=40", "optim.accum_steps=1", more=more, devices=devices))
    assert [code for code, *_ in results] == [2, 2], results
    for *_, error in results:
        assert len(error.strip().split("\n")) == 1 and all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


IMPATIENT = """
import sys
from jaxlm import main
from jaxlm.run import begin
begin.FOLDER_LIMIT = 2
sys.exit(main.exit_code(lambda: main.run(sys.argv[1:])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_hosts_with_different_workdirs_are_refused(begun: bool, two: tuple[Path, Any], tmp_path: Path):
    """A new run and a resumed run are refused before they train, because one host's work would not be saved."""
    first = tmp_path / "run"
    if begun:
        shutil.copytree(two[0], first)
    other = {1: ["--workdir", str(tmp_path / "other")]}
    results = finish(start(first, 2, "steps=60", more=other, program=["-c", IMPATIENT]))
    assert [code for code, *_ in results] == [2, 2], results
    for *_, error in results:
        assert "--workdir" in error and "config.json is 'not there' on host" in error and "Traceback" not in error, (
            error
        )
    assert not (tmp_path / "other").exists() and (begun or not lines(first))


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["another", "none"])
def test_hosts_with_different_data_are_refused(there: bool, tmp_path: Path):
    """A host without data fails alone, and the other host reports why."""
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        if i == 0 or there:
            (tmp_path / f"{i}/text").write_text(f"host {i} has another text\n" * 500)
    keys = flags("steps=10", "data.source=text", "data.tokenizer=bytes", "data.path=text", "data.val_fraction=0.2",
                 "eval.sample_tokens=0")  # fmt: skip
    address, started = f"127.0.0.1:{free_port()}", []
    env = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)}
    for i in range(2):
        command = [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), "--workdir", str(tmp_path / "run"),
                   *keys, "--coordinator", address, "--num_processes", "2", "--process_id", str(i)]  # fmt: skip
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path / str(i), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            )
        )
    results = finish(started)
    assert [code for code, *_ in results] == [2, 2], results
    words = ["the data: fingerprint is", "(process 1)"] if there else ["data.path is 'text'"]
    for *_, error in results:
        assert all(word in error for word in words) and "Traceback" not in error, error
    if not there:
        assert "(process 1) has ended with exit code 2: data.path" in results[0][2]


LATE = """
import sys, time
from jaxlm import main
from jaxlm.host import distributed
from jaxlm.host.join import join
distributed.PATIENCE, distributed.PREPARE_LIMIT = 1, 6
index = int(sys.argv[2])
hosts = join(sys.argv[1], 2, index)
def program():
    for delay in (4, 60):
        time.sleep(delay * index)
        distributed.check_same(f"the data {delay}", {"fingerprint": 1})
hosts.run(program, main.exit_code)
"""


@pytest.mark.slow
def test_a_run_waits_for_a_late_host_and_names_it():
    """The first host waits as long as its message says, and then gives up."""
    command = [sys.executable, "-c", LATE, f"127.0.0.1:{free_port()}"]
    started = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    (code, _, error), (other, *_) = finish(started)
    late = f"host {socket.gethostname()} (process 1)"
    assert (code, other) == (2, 2)
    assert error.strip().split("\n") == [
        f"jaxlm: waiting for the data 4 of {late}, 1 min at most",
        f"jaxlm: waiting for the data 60 of {late}, 1 min at most",
        f"jaxlm: the data 60 of {late} did not arrive in time",
    ]


@pytest.mark.slow
def test_an_absent_coordinator_ends_the_process_with_2():
    address = f"127.0.0.1:{free_port()}"
    script = (
        "import sys; from jaxlm import main; from jaxlm.host import distributed; distributed.JOIN_LIMIT = 3; "
        "sys.exit(main.exit_code(lambda: main.run(sys.argv[1:])))"
    )
    command = [sys.executable, "-c", script, "--config", str(CONFIG), *flags("steps=10"), "--coordinator", address,
               "--num_processes", "2", "--process_id", "1"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    last = result.stderr.strip().split("\n")[-1]
    assert (result.returncode, address in last, socket.gethostname() in last) == (2, True, True), result.stderr
    assert result.stderr.strip() == last

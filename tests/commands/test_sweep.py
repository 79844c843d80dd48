"""`jaxlm sweep` trains every point of a grid, goes on after a failure, resumes, and compares the points."""

import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm.checkpoint import workdirs
from jaxlm.commands import sweep_results, sweep_state
from jaxlm.config import UserError, grid
from tests.exit_codes import TINY, contents, tool
from tests.runs import CONFIG, ROOT, lines, wait_for_step

BASE = ["--config", str(CONFIG), *[f"--config.{override}" for override in TINY]]
# So that a learning rate of 1e30 diverges at once.
WILD = ["--config.optim.name=sgd", "--config.optim.clip_norm=0", "--config.optim.max_returns=0"]


def state(folder: Path) -> list[tuple[str, int | None]]:
    """The state and the last exit code of each point."""
    sweep = sweep_state.read(folder)
    return [(sweep.status(run), run.exit) for run in sweep.runs]


def last_object(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep over two rates and two seeds, each point trained by `--point`."""
    folder = tmp_path_factory.mktemp("sweeps") / "seeds"
    options = ["--workdir", folder, "--grid", "optim.lr=1e-3,3e-2", "--grid", "seed=0,1"]
    assert tool("sweep", *BASE, *options, "--slurm", folder.parent / "array.sbatch") == 0
    assert state(folder) == [("waiting", None)] * 4
    for i in range(4):
        assert tool("sweep", "--workdir", folder, "--point", i) == 0
    assert state(folder) == [("done", 0)] * 4
    return folder


def test_a_value_in_quotes_holds_commas():
    assert grid.points(['data.path="a,b",c']) == [{"data.path": "a,b"}, {"data.path": "c"}]
    assert grid.points(["data.mixture=0.7 stdlib; 0.3 text x"]) == [{"data.mixture": "0.7 stdlib; 0.3 text x"}]
    for wrong in ("", "seed", "seed=", "seed=1,", "=1", 'seed="1', 'seed="1"2'):
        with pytest.raises(UserError, match="--grid is"):
            grid.points([wrong])


def test_names_of_folders_are_readable_or_safe():
    assert sweep_state.folder_name({"optim.lr": "1e-4", "seed": "0"}) == "optim.lr=1e-4,seed=0"
    odd = [sweep_state.folder_name({"data.path": path}) for path in ("/a/b c", "/a/b/c", "x" * 500)]
    assert len(set(odd)) == 3 and all(re.fullmatch(r"data\.path=[\w.-]{1,150}", name) for name in odd)


def test_a_sweep_goes_on_after_a_failure_and_resumes_after_a_signal(tmp_path: Path):
    """The first point diverges. SIGTERM stops the second one, which saves; the same command finishes it."""
    folder = tmp_path / "sweep"
    long = ["--config.steps=1000", "--config.checkpoint.every_steps=100000", "--config.eval.every_steps=0"]
    command = [sys.executable, "-m", "jaxlm", "sweep", *BASE, *WILD, *long, "--config.log.every_steps=10"]
    command += ["--grid", "optim.lr=1e30,0.03", "--workdir", str(folder)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    wait_for_step(process, folder / "optim.lr=0.03", 20)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "saved; run the same command again to resume" in out  # the point
    assert out.endswith("stopped in point 2 of 2; run the same command again to continue\n")
    assert "1/2 · optim.lr=1e30 · diverged, exit code 3" in out
    assert state(folder) == [("diverged", 3), ("stopped", 75)]
    before = contents(folder / "optim.lr=1e30")

    done = subprocess.run(command, cwd=ROOT, timeout=120, check=False, **streams)
    assert done.returncode == 0, done.stderr
    assert "resumes after step" in done.stdout and "optim.lr=1e30 ·" not in done.stdout
    assert state(folder) == [("diverged", 3), ("done", 0)] and contents(folder / "optim.lr=1e30") == before
    steps = [m["step"] for m in lines(folder / "optim.lr=0.03") if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == 1000
    assert re.search(r"^point 0 diverged: training diverged in step", done.stdout, re.MULTILINE)
    found = last_object(done.stdout)
    assert found["best"]["workdir"] == str(folder / "optim.lr=0.03") and "means" not in found
    assert found["best"]["eval_loss"] == lines(folder / "optim.lr=0.03")[-1]["eval_loss"]
    assert [(p["state"], p["exit"]) for p in found["points"]] == [("done", 0), ("diverged", 3)]
    script = tmp_path / "file"
    assert tool("sweep", "--workdir", folder, "--slurm", script) == 2  # no point is left
    assert tool("sweep", "--workdir", folder, "--retry", "--slurm", script) == 0
    assert "\n#SBATCH --array=0\n" in script.read_text()


def test_the_table_the_page_and_the_object_compare_the_points(seeds: Path, capsys: pytest.CaptureFixture[str]):
    assert tool("sweep", "--workdir", seeds, "--table") == 0
    out = capsys.readouterr().out
    found = last_object(out)
    losses = [p["eval_loss"] for p in found["points"]]
    assert losses == sorted(losses) and len(set(losses)) == 4
    for point in found["points"]:
        scores = [m for m in lines(Path(point["workdir"])) if "eval_loss" in m]
        assert point["eval_loss"] == min(m["eval_loss"] for m in scores) and point["steps"] == 2
    assert found["best"] == found["points"][0]
    for mean in found["means"]:
        own = [p["eval_loss"] for p in found["points"] if p["point"]["optim.lr"] == mean["point"]["optim.lr"]]
        assert mean["seeds"] == 2 and mean["eval_loss"] == pytest.approx([statistics.mean(own), statistics.stdev(own)])
    rows = [line.split() for line in out.splitlines() if line.split()[-1:] == ["done"]]
    assert [row[:4] for row in rows] == [
        [str(p["index"]), p["point"]["optim.lr"], p["point"]["seed"], f"{p['eval_loss']:.4f}"] for p in found["points"]
    ]
    assert f"report: {seeds / 'report.html'}\n" in out
    page = (seeds / "report.html").read_text()
    assert "<h2>Points</h2>" in page and "<h2>Means over seeds</h2>" in page
    assert {f"lr={lr} seed={seed}" for lr in ("1e-3", "3e-2") for seed in "01"} <= set(
        json.loads(re.findall(r'"names": (\[.*?\])', page)[0])
    )


def test_another_grid_adds_points_and_another_base_is_refused(seeds: Path, capsys: pytest.CaptureFixture[str]):
    script = seeds.parent / "more.sbatch"
    # The seed of the configuration is 0, so the first of these is a point of the sweep already.
    assert tool("sweep", "--workdir", seeds, "--grid", "optim.lr=1e-3,5e-3", "--slurm", script) == 0
    assert state(seeds) == [*[("done", 0)] * 4, ("waiting", None)]
    assert re.search(r"^#SBATCH --array=4$", script.read_text(), re.MULTILINE)
    before = contents(seeds)
    capsys.readouterr()
    assert tool("sweep", *BASE, "--config.optim.b1=0.5", "--grid", "seed=0,7", "--workdir", seeds) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "optim.b1 was" in error and "is now 0.5" in error
    assert contents(seeds) == before
    # Rows of points that have not begun come last, and their seed is unknown.
    assert tool("sweep", "--workdir", seeds, "--table") == 0
    assert last_object(capsys.readouterr().out)["points"][-1]["state"] == "waiting"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([*BASE, "--grid", "optim.lr=1,x"], ["point optim.lr=x", "optim.lr is 'x'"]),
        ([*BASE, "--grid", "optim.lrr=1"], ["point optim.lrr=1", "did you mean 'optim.lr'"]),
        ([*BASE, "--grid", "seed=0,1", "--grid", "model.num_heads=2,3"], ["seed=0 model.num_heads=3", "divisor"]),
        ([*BASE, "--grid", "parallel.devices=1,3"], ["parallel.devices=3", "batch_size is 8"]),
        ([*BASE, "--grid", "seed=0", "--config.steps=x"], ["steps is 'x'"]),
        ([*BASE, "--grid", "seed=0", "--grid", "seed=1"], ["--grid names seed twice"]),
        ([*BASE, "--grid", "seed=0", "--coordinator", "a:1"], ["--coordinator", "--slurm FILE"]),
        ([*BASE, "--grid", "seed=0", "--slurm", "none/file"], ["--slurm is none/file"]),
        ([*BASE, "--grid", "seed=0", "--point", "2"], ["--point is 2", "0 to 0"]),
        ([*BASE, "--grid", "seed=0", "--point", "-1"], ["--point is -1"]),
        ([*BASE, "--grid", "seed=0", "--table"], ["--grid is given with --table"]),
        ([*BASE], ["no sweep.json", "--config and --grid"]),
        (["--table"], ["no sweep.json"]),
        (["--config.seed=1"], ["--config.seed is given without --config"]),
        (["--gird=1"], ["--gird"]),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_is_written(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert tool("sweep", *argv, "--workdir", tmp_path / "sweep") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not any(tmp_path.iterdir())


def test_a_base_that_only_the_grid_completes_is_allowed_and_each_optimizer_has_its_own_rate(tmp_path: Path):
    """The base keeps `own` values open: each point gets those of its optimizer."""
    options = ["--config", str(CONFIG), "--config.data.source=text", "--config.data.vocab_size=300"]
    options += ["--grid", f"data.path={ROOT / 'README.md'}"]
    options += ["--grid", "optim.name=adamw,lion", "--workdir", str(tmp_path / "sweep")]
    assert tool("sweep", *options, "--slurm", tmp_path / "file") == 0
    sweep = sweep_state.read(tmp_path / "sweep")
    assert [sweep.config(run).optim.lr for run in sweep.runs] == [0.004, 0.001]


def test_folders_and_files_of_others_are_left_alone(seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes").write_text("mine")
    finished = seeds / "optim.lr=1e-3,seed=0"
    before = contents(tmp_path) | contents(finished)
    for folder in (tmp_path, finished, tmp_path / "notes"):
        assert tool("sweep", *BASE, "--grid", "seed=0", "--workdir", folder) == 2
        assert "no sweep" in capsys.readouterr().err
    assert tool("sweep", *BASE, "--grid", "seed=0", "--workdir", tmp_path / "new", "--slurm", tmp_path / "notes") == 2
    assert contents(tmp_path) | contents(finished) == before
    empty = '{"config": %s, "grids": [], "points": %s}'
    for damage in ("nonsense", "[]", empty % ("{}", "[{}]"), empty % (3, "[]"), empty % ("{}", "[]")):
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep/sweep.json").write_text(damage)
        assert tool("sweep", "--workdir", tmp_path / "sweep") == 2
        assert "sweep.json" in capsys.readouterr().err


def test_a_point_that_another_process_trains_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sweep"
    assert tool("sweep", *BASE, "--grid", "seed=0", "--workdir", folder, "--slurm", tmp_path / "file") == 0
    with workdirs.Lock() as lock:
        lock.take(folder / "seed=0")
        assert state(folder) == [("running", None)]
        assert tool("sweep", "--workdir", folder) == 0  # trains nothing
        assert last_object(capsys.readouterr().out)["points"][0]["state"] == "running"
        assert tool("sweep", "--workdir", folder, "--point", "0") == 2
        assert "another run is at work" in capsys.readouterr().err
    assert state(folder) == [("waiting", None)]


def test_means_leave_out_points_that_are_not_done():
    values = [("done", 1.0), ("done", 3.0), ("diverged", 9.0)]
    runs = [sweep_state.Run(str(i), {"seed": str(i)}) for i in range(3)]
    sweep = sweep_state.Sweep(Path("x"), None, [], runs)  # pyright: ignore[reportArgumentType]
    found = [
        sweep_results.Result(run, i, Path("x"), status, run.name, None, best=loss, last=loss)
        for i, (run, (status, loss)) in enumerate(zip(runs, values, strict=True))
    ]
    [mean] = sweep_results.means(sweep, found)
    assert (mean.seeds, mean.of, mean.best) == (2, 3, (2.0, pytest.approx(2**0.5)))
    assert sweep_results.means_table([mean]).rows == [("2 of 3", "2.0000 ± 1.4142", "2.0000 ± 1.4142")]

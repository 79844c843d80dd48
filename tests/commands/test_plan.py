"""Runs `jaxlm plan` without a GPU or its plugin, and checks its numbers against the configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.commands.plan_variants import changes
from jaxlm.config.files import BASE, load

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.data.source=synthetic",
    "--config.data.vocab_size=64",
    "--config.model.num_layers=2",
    "--config.model.d_model=32",
    "--config.model.num_heads=2",
    "--config.seq_len=16",
    "--config.batch_size=16",
    "--config.optim.name=adamw",
    "--config.optim.warmup_steps=1",
    "--config.steps=1000",
]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/plan.py"), "--config", "base", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def numbers(*arguments: str) -> dict:
    done = plan(*arguments, *SMALL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_numbers_of_a_plan():
    found = numbers("--device", "h100", "--devices", "16")
    # 64 x 32 tables in and out; a layer has 12 D^2 weights, two norms over D and two over heads; a final norm.
    assert found["parameters"] == 2 * 64 * 32 + 2 * (12 * 32**2 + 2 * 32 + 2 * 16) + 32
    memory = found["memory_bytes"]
    assert memory["parameters"] == memory["gradients"] == 4 * found["parameters"]
    assert memory["optimizer"] == pytest.approx(8 * found["parameters"], abs=16)
    assert memory["total"] == sum(v for k, v in memory.items() if k not in ("total", "usable")) and found["fits"]
    assert found["tokens_per_second"] == pytest.approx(16 * 16 / found["step_seconds"])
    assert found["hours"] == pytest.approx(1000 * found["step_seconds"] / 3600)
    assert found["kilowatt_hours"] == pytest.approx(0.7 * 16 * found["hours"])
    assert sum(c["bytes"] * c["times"] for c in found["collectives"]) == pytest.approx(
        4 * found["parameters"], rel=0.01
    )
    assert [c["devices"] for c in found["curve"]] == [2**i for i in range(13)]
    assert found["costs"][0]["source"].startswith("jaxlm/")


def test_zero_shares_the_state_among_all_devices():
    plain, shared = (numbers("--device", "H100", "--devices", "4", f"--config.parallel.zero={z}") for z in (0, 3))
    for part in ("optimizer", "parameters", "gradients"):
        assert shared["memory_bytes"][part] / plain["memory_bytes"][part] == pytest.approx(1 / 4, rel=0.01), part


def test_replicas_of_several_devices_have_the_work_of_the_batch():
    """A batch of fewer rows than devices is not rounded to nothing."""
    many, few = (
        numbers("--device", "H100", "--devices", str(n), f"--config.parallel.tensor={t}", "--config.model.d_ff=64",
                "--config.batch_size=8", "--config.model.num_heads=2", "--config.loss.chunk=0")
        for n, t in ((16, 2), (8, 1))
    )  # fmt: skip
    assert many["product_flops"] == pytest.approx(few["product_flops"] / 2, rel=0.01)


@pytest.mark.ci
def test_a_grid_is_recommended():
    done = plan("--device", "H100", "--devices", "16", "--recommend", *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] in (8, 16) and found["most_devices"] == 16
    best = [way for way in found["ways"] if way["overrides"] == found["recommended"]]
    assert len(best) == 1 and best[0]["compiled"]["fits"]
    compiled = [way["compiled"]["step_seconds"] for way in found["ways"] if way["compiled"]]
    assert len(compiled) == 3 and best[0]["compiled"]["step_seconds"] == min(compiled)
    assert f"on {found['devices']} x H100" in done.stdout and "why: a step" in done.stdout


def test_two_configurations_side_by_side(tmp_path: Path):
    other = tmp_path / "shorter.py"
    text = (
        "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.seq_len = 1\n    return c\n"
    )
    other.write_text(text)
    same = [o for o in SMALL if "seq_len" not in o]
    done = plan("--device", "H100", "--devices", "8", "--compare", str(other), *same)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == found["compare"]["parameters"]
    assert found["memory_bytes"]["kept"] > 100 * found["compare"]["memory_bytes"]["kept"]  # 256 tokens and 1
    shown = [line for line in done.stdout.splitlines() if line.startswith(" parameters, M")]
    assert len(shown) == 1 and shown[0].split()[-1] == "1.00"


def test_changes_that_need_less_memory_keep_the_batch():
    config = load(BASE, ["--config.batch_size=96"])
    singles, pairs, triples = changes(config, 8)  # 12 rows a device
    assert singles == [("optim.accum_steps=2",), ("optim.accum_steps=4",), ("model.remat=full",), ("parallel.zero=1",),
                       ("parallel.zero=3",)]  # fmt: skip
    assert pairs == [("optim.accum_steps=4", "model.remat=full"), ("optim.accum_steps=4", "parallel.zero=3"),
                     ("model.remat=full", "parallel.zero=3")]  # fmt: skip
    assert triples == [("optim.accum_steps=4", "model.remat=full", "parallel.zero=3")]
    config.parallel.reduce, config.model.remat = "topk", "full"
    assert changes(config, 8) == [singles[:2], [], []]  # no ZeRO with topk
    for overrides in (*singles, *pairs, *triples):
        assert load(BASE, ["--config.batch_size=96", *(f"--config.{o}" for o in overrides)]).batch_size == 96


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "H1000", "--devices", "8"], "jaxlm: --device is 'H1000'; allowed: A100-40, "),
        (["--device", "H100", "--devices", "0"], "jaxlm: --devices is 0; allowed: 1 or more"),
        (["--device", "H100", "--devices", "3"], "jaxlm: batch_size is 8; allowed: a multiple of 3"),
        (["--device", "H100", "--devices", "12"], "jaxlm: --devices is 12; allowed with --device H100: up to 8, the"),
        (
            ["--device", "H100", "--devices", "8", "--recommend", "--compare", "x"],
            "jaxlm: --compare is x; allowed: without",
        ),
        (["--device", "H100", "--devices", "8", "--config.data.tokenizer=chars"], "jaxlm: --vocab_size is missing"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    done = plan(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_a_plan_is_written_as_a_page(tmp_path: Path):
    page = tmp_path / "plan.html"
    done = plan("--device", "H100", "--devices", "2", "--html", str(page), *SMALL)
    assert done.returncode == 0, done.stderr
    found, text = json.loads(done.stdout.splitlines()[-1]), page.read_text()
    assert f"{found['memory_bytes']['optimizer'] / 1e9:.3g} GB" in text
    assert found["costs"][0]["source"] in text and "% of linear" in text


def test_a_page_in_no_folder_is_refused_before_the_step_is_compiled(tmp_path: Path):
    done = plan("--device", "H100", "--devices", "2", "--html", str(tmp_path / "no" / "plan.html"), *SMALL)
    assert done.returncode == 2 and "--html is" in done.stderr and len(done.stderr.splitlines()) == 1

"""`tools/gpu_check.sh` is ready for a GPU: its table fits its document, and what it starts is accepted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config.files import load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/gpu_check.sh"
NUMBERS = {
    "devices": "1 x NVIDIA H100 80GB HBM3", "step_ms": 20.0, "step_ms_range": [19.0, 21.0], "trainer_ms": 21.0,
    "trainer_ms_range": [20.0, 22.0], "planned_step_ms": 18.0, "tokens_per_second": 585142.9, "mfu": 0.5,
    "peak_memory_bytes": 7e9, "planned_memory_bytes": 6e9,
}  # fmt: skip
PEER = {"torch_step_ms": 25.0, "torch_step_ms_range": [25.0, 26.0], "torch_peak_memory_bytes": 9e9,
        "step_over_torch": 0.8}  # fmt: skip


def test_the_table_replaces_what_is_between_the_marks(tmp_path: Path):
    sweep = [
        {"point": {"batch_size": "12"}} | NUMBERS | PEER,
        {"point": {"batch_size": "48"}, "error": "out of memory"},
    ]
    (tmp_path / "batches.txt").write_text(f"noise\n{json.dumps({'points': sweep})}\n")
    (tmp_path / "remat.txt").write_text(json.dumps({"points": [{"point": {"model.remat": "full"}} | NUMBERS]}))
    document = tmp_path / "gpu.md"
    document.write_text((ROOT / "docs/gpu.md").read_text())
    for _ in range(2):  # the second time it replaces the first
        done = subprocess.run(
            [sys.executable, ROOT / "tools/gpu_table.py", tmp_path, document], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.count("1 x NVIDIA H100 80GB HBM3; jax ") == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "gpt2_124m | " in line]
    measured = [row for row in rows if "=" in row[1]]
    assert [row[1] for row in measured] == ["batch_size=12", "batch_size=48", "model.remat=full"]
    assert measured[0][-3:] == ["25 (25 to 26)", "9", "0.80"] and measured[1][2] == "failed"
    assert measured[2][-3:] == ["", "", ""] and len({len(row) for row in measured}) == 1


@pytest.mark.parametrize("kind", ["MODEL", "LLAMA"])
def test_its_configurations_are_valid_on_gpus_and_on_cpus(kind: str):
    """The variables are the script's own, as bash expands them."""
    text = SCRIPT.read_text()
    settings = text[text.index("SYNTHETIC=") : text.index("TORCH=")]
    for backend in ("gpu", "cpu"):
        done = subprocess.run(
            ["bash", "-c", f'BACKEND={backend}\n{settings}\necho "${kind}"'], capture_output=True, text=True, check=True
        )
        _, name, *overrides = done.stdout.split()
        config = load(ROOT / f"configs/{name}.py", overrides)
        assert config.data.source == "synthetic" and config.parallel.devices == 1


def test_each_part_has_a_limit_and_all_together_take_less_than_nine_minutes():
    """The parts are expected to take half of their limits."""
    limits = [int(n) for n in re.findall(r"^part \w+ (\d+) ", SCRIPT.read_text(), re.MULTILINE)]
    assert len(limits) == 5 and sum(limits) <= 540


def test_help_and_a_wrong_argument():
    for argument, code in (("--help", 0), ("--bad", 2)):
        done = subprocess.run([SCRIPT, argument], capture_output=True, text=True)
        assert done.returncode == code and "tools/gpu_check.sh --wheels" in done.stdout

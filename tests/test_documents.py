"""Every command in the documents: run in a temporary folder, made small, or only read by its parser, for a reason.

A command in a block of its own must be in one of the tables here. Commands in sentences and in tables, such as `jaxlm
prepare --config FILE`, are read by their parsers.
"""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from jaxlm.__main__ import COMMANDS
from jaxlm.config import UserError
from jaxlm.host.exit_codes import exit_code
from tests.documents import arguments, check, commands
from tests.runs import ROOT

FOUND = commands()
TUTORIAL = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)

SIZES = "--config.seq_len=32 --config.model.d_model=32 --config.model.num_layers=1 --config.model.num_heads=2"
DATA = "--config.data.vocab_size=400 --config.eval.batches=1 --config.eval.sample_tokens=0 --config.parallel.devices=2"
LLAMA = f"{SIZES} --config.model.d_ff=32 {DATA}"
SHORT = (
    "--config.steps=3 --config.optim.warmup_steps=1 --config.optim.name=adamw --config.model.scan_unroll=1 "
    "--noconfig.log.tensorboard --noconfig.eval.baselines"
)
TEXTS = "--config.data.source=text --config.data.path=texts/"
BYTES = "--config.data.tokenizer=bytes --config.batch_size=4"
# In this order, so that later commands use what earlier ones made: the command, and what makes it small.
RUN: dict[str, str] = {
    "python make_texts.py": "",
    "jaxlm inspect --config llama_small --config.data.path=texts/": LLAMA,
    "jaxlm prepare --config llama_small --config.data.path=texts/": LLAMA,
    "jaxlm show llama_small --config.data.path=texts/": LLAMA,
    "jaxlm train --config llama_small --config.data.path=texts/ --workdir runs/docs --max_minutes 4 "
    "--config.model.matmul_precision=fastest": (f"{LLAMA} {SHORT}"),
    "jaxlm show runs/docs": "",
    "jaxlm generate --workdir runs/docs --prompt 'The ' --max_new_tokens 60 --temperature 0.7": "--max_new_tokens 3",
    "jaxlm evaluate --workdir runs/docs --step best": "",
    "jaxlm report runs/docs -o docs.html": "",
    "jaxlm export-hf runs/docs docs-llama": "",
    "jaxlm import-hf SRC WORKDIR": "",
    "jaxlm generate --workdir WORKDIR --prompt 'Once upon'": "--max_new_tokens 3",
    "jaxlm train --config configs/base.py --workdir runs/tuned --config.checkpoint.resume=WORKDIR ...": (
        f"{TEXTS} --config.seq_len=32 {DATA} {SHORT}"
    ),
    "jaxlm export-hf runs/tuned DST [--step N|best] [--dtype bfloat16]": "--step best",
    "jaxlm train --config finetune --workdir runs/lora --config.checkpoint.resume=runs/docs "
    "--config.data.path=my_texts/": f"{TEXTS} {DATA} {SHORT} --config.seq_len=32",
    "jaxlm generate --workdir runs/lora --prompt 'Once'": "--max_new_tokens 3",
    "jaxlm export-hf runs/lora my-model": "",
    "jaxlm export-hf runs/lora my-adapter --adapter": "",
    "jaxlm sweep --config base --grid optim.lr=1e-3,3e-3,1e-2 --grid seed=0,1 --slurm sweep.sbatch": "",
    "jaxlm sweep --workdir runs/base-sweep --table": "",
    r"jaxlm train --config configs/base.py --config.data.source=jsonl --config.data.path=chats.jsonl "
    r"--config.data.messages_key=messages --config.data.chat_template=$'<|{role}|>\n{content}\n'": (
        f"{SIZES} {DATA} {SHORT} {BYTES}"
    ),
    "jaxlm generate --workdir runs/base --chat --prompt 'What is 2 + 2?'": "--max_new_tokens 3",
    "jaxlm train --config seq2seq": (
        f"{SHORT} --config.model.d_model=32 --config.eval.batches=1 --config.parallel.devices=2"
    ),
    "jaxlm generate --workdir runs/seq2seq --prompt 'Return the number of bytes that were written to the file.'": "",
    "jaxlm evaluate --workdir runs/seq2seq --answers answers.jsonl": "",
    "jaxlm train --config seq2seq --workdir runs/translate --config.data.source=jsonl --config.data.path=pairs.jsonl "
    "--config.data.prompt_key=en --config.data.response_key=de --config.eval.sample_prompt='good morning'": (
        f"{SIZES} {SHORT} {BYTES} --config.parallel.devices=2 --config.model.encoder_len=64"
    ),
    "jaxlm train --config configs/base.py --config.parallel.reduce=int8 --config.parallel.overlap=true": (
        f"{TEXTS} {SIZES} {DATA} {SHORT} --workdir runs/int8"
    ),
    "jaxlm train --config configs/base.py --config.steps=800 --config.parallel.devices=2 "
    "--config.model.matmul_precision=fastest --config.parallel.reduce=topk --workdir runs/topk": (
        f"{TEXTS} {SIZES} {DATA} {SHORT}"
    ),
    "jaxlm bench comm --config configs/gpt_10m.py --config.data.path=x --vocab_size 65 --config.batch_size=8 "
    "--config.parallel.devices=8 --config.parallel.zero=1 --config.parallel.overlap=true "
    "--config.model.scan_unroll=1": SIZES,
}
VALUES = {"SRC": "docs-llama", "WORKDIR": "runs/imported", "DST": "tuned-llama"}

# Reasons why a command is only read by its parser.
INSTALLS = "installs into .venv, or runs all of this: tests/commands/test_install.py installs a wheel and runs it"
CONFIGS = "a large model, or a text to download; tests/config/test_configs.py trains each configuration, small"
CHAOS = "minutes; tests/development/test_chaos.py runs it, small"
BENCH = "minutes, and nanoGPT; tests/commands/test_bench.py runs it, small"
FINETUNING = "tests/run/test_finetuning.py runs these commands of that page"
MEASURED = "minutes, from the run of `make train`; another command here starts a run with LoRA"
HARNESS = "needs the harness, which tests/interop/test_harness.py runs"
PRETRAINED = "options to add to a command; the tokenizer is Qwen's"
PARSED: dict[str, str] = {
    "jaxlm plan --config llama_small --config.data.path=texts/ --devices 1 --device CPU": (
        "measures this machine for half a minute; tests/commands/test_plan.py plans"
    ),
    "make train": INSTALLS,
    "make test": INSTALLS,
    "make check": INSTALLS,
    "make train CONFIG=configs/debug.py": INSTALLS,
    'make train CONFIG=configs/shakespeare_char.py ARGS="--config.data.path=input.txt"': INSTALLS,
    "jaxlm plan --config lora_8b --devices 1 --device RTX4090 --config.data.path=chats.jsonl --vocab_size 128256": (
        "needs the 7 GB of `make plan-env`; tests/gpu/test_gpu_compile.py compiles it"
    ),
    "jaxlm sweep --config base --grid optim.lr=1e-3,3e-3,1e-2 --grid seed=0,1": (
        "six runs; tests/commands/test_sweep.py trains sweeps"
    ),
    "make plan-env": "downloads 7 GB",
    "make test-gpu": "downloads 7 GB",
    ".venv-plan/bin/jaxlm plan --config gpt2_124m --devices 8 --device H100 --config.data.path=x": (
        "needs the 7 GB of `make plan-env`; tests/commands/test_plan.py plans for GPUs with what is there"
    ),
    ".venv/bin/pytest -n0 tests/sync/test_sync.py -k ring": "runs tests, which run anyway",
    "--config.model.activation=swiglu --config.model.key_offset=false": "options to add to a command",
}
GRID = "needs 16 GPUs; tests/train/test_grids.py trains small models on grids"
# Commands that start like this, too.
PARSED_LIKE = {
    ".venv/bin/python -m jaxlm.main --config configs/gpt2_124m.py ": CONFIGS,
    "jaxlm evaluate --workdir runs/base --config.data.source=text ": MEASURED,
    "jaxlm train --config finetune --workdir runs/numpy ": MEASURED,
    "jaxlm train --config base --workdir runs/numpy-all ": MEASURED,
    "jaxlm evaluate --workdir runs/base --tasks ": HARNESS,
    "jaxlm evaluate --workdir runs/chat --tasks ": HARNESS,
    "jaxlm train --config llama_1b ": GRID,
    ".venv-plan/bin/jaxlm plan --config llama_405b ": "needs the 7 GB of `make plan-env`, as above",
    ".venv-plan/bin/jaxlm plan --config llama_1b ": "needs the 7 GB of `make plan-env`, as above",
    "python tools/chaos": CHAOS,
    "jaxlm bench --config ": BENCH,
    "sudo .venv/bin/python tools/netbench.py ": "makes network namespaces as root, and runs PyTorch beside",
    "jaxlm train --config configs/debug.py --workdir runs/animals ": FINETUNING,
    "jaxlm train --config configs/debug.py --workdir runs/chat ": FINETUNING,
    "jaxlm generate --workdir runs/chat --chat ": FINETUNING,
    "--config.data.tokenizer=hf ": PRETRAINED,
}
# What no parser of this project reads.
OTHERS = {
    "git clone … && cd jaxlm",
    "git tag v0.2.0",
    "pip install .",
    "pip install 'lm_eval>=0.4.10'",
    "python -m jaxlm.interop.harness --model jaxlm --model_args workdir=runs/base,step=best --tasks arc_easy "
    "--batch_size auto",
    "sbatch --gpus-per-task=1 sweep.sbatch",
    "pip install s3fs",
    "pip install torch transformers",
    "pre-commit install",
    "python -m build",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the commands run, with the files that the documents name."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("documents")
    os.chdir(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "make_texts.py").write_text(TUTORIAL[0].replace('"*.py"', '"a*.py"'))
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    (folder / "pairs.jsonl").write_text("".join(f'{{"en": "number {i}", "de": "Zahl {i}"}}\n' for i in range(200)))
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 200)
    yield folder
    os.chdir(before)


def argv(command: str) -> list[str]:
    """The words of a command, then those that make it small, which replace the same options."""
    words = [*arguments(command), *arguments(RUN[command])]
    return [re.sub(r"(SRC|WORKDIR|DST)$", lambda name: VALUES[name[0]], word) for word in words]


def run(words: list[str]) -> int:
    if words[0] == "python":
        exec(compile(Path(words[1]).read_text(), words[1], "exec"), {})
        return 0
    _, name, *rest = words
    module = importlib.import_module(COMMANDS[name].module)
    return exit_code(lambda: (module.run if name == "train" else module.main)(rest))


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:60])
def test_it_runs(command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(argv(command)) == 0, capfd.readouterr().err


@pytest.mark.parametrize("command", [command for command in FOUND if command not in OTHERS], ids=lambda c: c[:60])
def test_its_parser_takes_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if not command.startswith("python make_texts.py"):
        check(command, whole=FOUND[command])


def test_every_command_is_in_a_table() -> None:
    blocks = {command for command, whole in FOUND.items() if whole}
    like = {command for command in blocks for start in PARSED_LIKE if command.startswith(start)}
    assert blocks - RUN.keys() - PARSED.keys() - like - OTHERS == set()
    assert (RUN.keys() | PARSED.keys() | OTHERS) - FOUND.keys() == set()
    assert not (RUN.keys() & PARSED.keys()) and not ((RUN.keys() | PARSED.keys()) & like)
    assert all(any(command.startswith(start) for command in blocks) for start in PARSED_LIKE)
    named = re.findall(r"tests/[\w/]+\.py", " ".join([*PARSED.values(), *PARSED_LIKE.values()]))
    assert named and all((ROOT / name).exists() for name in named)


def test_commands_are_found_and_wrong_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(FOUND) > 80 and sum(FOUND.values()) > 35
    with pytest.raises(AssertionError, match=r"optim\.rate"):
        check("jaxlm train --config base --config.optim.rate=1")
    with pytest.raises(UserError, match="bas: no such file"):
        check("jaxlm train --config bas")
    with pytest.raises(SystemExit):
        check("jaxlm plan --config base")
    with pytest.raises(AssertionError):
        check("tools/gpu_chek.sh")
    with pytest.raises(CalledProcessError):
        check("make trian")


@pytest.mark.peers
def test_the_tutorials_python_loads_the_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in RUN if not Path("docs-llama").exists() else ():
        assert run(argv(command)) == 0
        if Path("docs-llama").exists():
            break
    exec(TUTORIAL[1], {})
    assert "The " in capsys.readouterr().out

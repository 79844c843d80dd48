"""Runs the commands of docs/finetuning.md: trains a model on texts, then on answers, and asks it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxlm import main
from jaxlm.commands import generate as generate_command
from jaxlm.config import files
from jaxlm.data.prompts import encode_prompt
from jaxlm.data.tokenizers.base import ByteTokenizer, CharTokenizer
from jaxlm.host.exit_codes import exit_code
from jaxlm.run import finished
from jaxlm.run.evaluation import sample_text
from jaxlm.run.open_run import open_run
from jaxlm.train.placement import Placement
from tests.runs import ROOT

DOCUMENT = (ROOT / "docs/finetuning.md").read_text("utf-8")
# Two devices are faster than the eight of the tests; the other keys make runs compile and write less.
QUICK = [
    "--config.parallel.devices=2",
    "--config.model.scan_unroll=1",
    "--config.eval.every_steps=0",
    "--config.checkpoint.every_steps=0",
    "--noconfig.log.tensorboard",
    "--noconfig.eval.baselines",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data and both trained runs of the document."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("recipe")
    os.chdir(folder)
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    exec(program, {})
    for command in commands("jaxlm train"):
        command[command.index("--config") + 1] = str(ROOT / "configs/debug.py")
        assert main.run([*command, *QUICK]) == 0
    yield folder
    os.chdir(before)


def commands(program: str) -> list[list[str]]:
    """Returns the arguments of each call of a program in the document."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    return [shlex.split(b.removeprefix(program).replace("\\\n", " ")) for b in blocks if b.startswith(program)]


class Generate:
    """Runs `jaxlm generate` in this process: checks its exit code, returns its output, keeps its errors."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd, self.error = capfd, ""

    def __call__(self, *argv: str, code: int = 0) -> str:
        assert exit_code(lambda: generate_command.main([*argv])) == code
        out, self.error = self.capfd.readouterr()
        return out


@pytest.fixture
def generate(recipe: Path, capfd: pytest.CaptureFixture[str]) -> Generate:
    capfd.readouterr()
    return Generate(capfd)


CHAT = ("--workdir", "runs/chat", "--temperature", "0")
TEXT = ("--workdir", "runs/animals", "--temperature", "0")


def test_the_answer_ends_by_itself(generate: Generate):
    (argv,) = commands("jaxlm generate")
    assert generate(*argv) == "the blue owl\n" and generate.error == ""
    assert generate(*CHAT, "--chat", "--prompt", "hen, red", "--step", "best") == "the red hen\n"
    # A prompt that is already formatted with the template gets the same answer.
    raw = "<|user|>\nowl, blue\n<|assistant|>\n"
    assert generate(*CHAT, "--prompt", raw) == f"{raw}the blue owl\n"


def test_the_sample_of_a_run_is_an_answer_and_can_be_cut(recipe: Path):
    """So that a signal need not wait for the whole sample."""
    run = open_run(Path("runs/chat"), None)
    placement = Placement(run.config, run.model, jax.devices()[:1])
    corpus = SimpleNamespace(tokenizer=run.tokenizer)
    parts: Any = SimpleNamespace(config=run.config, corpus=corpus, placement=placement)
    params = placement.place_params(run.params)
    whole, cut = (sample_text(parts, params, lambda now=now: now) for now in (False, True))
    assert whole == "owl, blue\nthe blue owl"
    assert cut and whole.startswith(cut) and len(cut) <= len("owl, blue\n") + 1  # only the first token


def test_stop_texts(generate: Generate):
    assert generate(*CHAT, "--chat", "--prompt", "owl, blue", "--stop", "zzz", "--stop", " ow") == "the blue\n"
    assert generate(*CHAT, "--stop=", code=2) == "" and "--stop" in generate.error


def test_several_samples(generate: Generate):
    """Prints whole samples in order, whichever ends first. The first equals that of a single sample."""
    argv = ("--workdir", "runs/animals", "--prompt", "the ", "--max_new_tokens", "20", "--stop", "\n", "--seed", "5")
    alone, text = generate(*argv), generate(*argv, "--num_samples", "3")
    parts = re.fullmatch(r"--- sample 1 ---\n(.*\n)--- sample 2 ---\n(.*\n)--- sample 3 ---\n(.*\n)", text)
    assert parts and parts[1] == alone
    assert all(re.fullmatch(r"the [a-z]+ [a-z]+\n", part) for part in parts.groups())


@pytest.mark.parametrize("prompt", ["--chat", "- é\n\U0001f600"])
def test_any_prompt_works(prompt: str, generate: Generate, tmp_path: Path):
    """As two arguments, as one argument, and in a file."""
    few = (*TEXT, "--max_new_tokens", "5")
    text = generate(*few, "--prompt", prompt)
    assert text.startswith(prompt) and generate.error == ""
    assert generate(*few, f"--prompt={prompt}") == text
    (tmp_path / "prompt").write_text(prompt + "\n")
    assert generate(*few, "--prompt_file", str(tmp_path / "prompt")) == text


@pytest.mark.parametrize("argv, piped", [(["--prompt", "-"], "the red"), ([], "the red\n"), ([], None)])
def test_a_prompt_from_stdin(
    argv: list[str], piped: str | None, generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Reads stdin with --prompt -, or if stdin is a file or a pipe, but not if it is neither."""
    source = tmp_path / "stdin"
    source.write_text(piped or "")
    expected = generate(*TEXT, "--max_new_tokens", "8", "--prompt", "the red" if piped else "")
    before = os.dup(0)
    with open(source if piped else os.devnull, "rb") as file:
        os.dup2(file.fileno(), 0)
        try:
            with open(0, closefd=False) as stdin:
                monkeypatch.setattr(sys, "stdin", stdin)
                assert generate(*TEXT, "--max_new_tokens", "8", *argv) == expected
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert ("read from stdin" in generate.error) == (piped is not None and not argv)


@pytest.mark.parametrize(
    "content, words", [(b"\xff", ["--prompt_file", "not UTF-8 at byte 0"]), (None, ["--prompt_file", "No such file"])]
)
def test_an_unusable_prompt_file_is_refused(
    content: bytes | None, words: list[str], generate: Generate, tmp_path: Path
):
    if content is not None:
        (tmp_path / "prompt").write_bytes(content)
    assert generate(*TEXT, "--prompt_file", str(tmp_path / "prompt"), code=2) == ""
    assert generate.error.count("\n") == 1 and all(word in generate.error for word in words)


def test_a_long_prompt_is_cropped(generate: Generate):
    """The model sees the last 64 tokens; the output shows the whole prompt."""
    end = "the red cat\n" * 5 + "the "
    prompt = "zebra " * 20 + end
    few = ("--max_new_tokens", "9")
    text = generate(*TEXT, *few, "--prompt", prompt)
    assert generate.error == "jaxlm: the prompt has 185 tokens; the model sees the last 64 of them (seq_len)\n"
    assert text.startswith(prompt) and len(text) > len(prompt) + 5
    assert generate(*TEXT, *few, "--prompt", "other " * 20 + end).endswith(text[len(prompt) :])


def test_chat_needs_a_run_trained_on_answers(generate: Generate):
    assert generate(*TEXT, "--chat", code=2) == ""
    assert "--chat: runs/animals was trained on texts" in generate.error and generate.error.count("\n") == 1
    assert generate(*TEXT, "--prompt=a", "--prompt_file=b", code=2) == "" and "--prompt_file" in generate.error


def test_text_is_shown_as_it_is_generated(recipe: Path):
    """Shows the first words before the last are generated. Ends quietly when the reader leaves."""
    command = [
        sys.executable,
        str(ROOT / "tools/generate.py"),
        "--workdir",
        "runs/animals",
        "--prompt",
        "the ",
        "--max_new_tokens",
        "20000",
    ]
    with subprocess.Popen(command, cwd=recipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(20).startswith(b"the ")
        assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("prompt", ["owl, blue", "the ", "\n", "", "-x", "-", "it's\n$HOME", "\u2028", "Ω"])
@pytest.mark.parametrize("name", ["animals", "chat", "letters"])
def test_the_hint_works_as_it_is_printed(name: str, prompt: str, generate: Generate):
    """For any prompt of the sample, even if the tokenizer cannot encode it."""
    config = files.load_workdir(f"runs/{name.replace('letters', 'chat')}")
    config.eval.sample_prompt = prompt
    tokenizer = CharTokenizer(list("<|>\nuserasistant")) if name == "letters" else ByteTokenizer()
    corpus: Any = SimpleNamespace(tokenizer=tokenizer)
    hint = finished._next(config, corpus, f"runs/{name.replace('letters', 'chat')}")
    assert "\n" not in hint and ("--chat" in hint) == (name != "animals")
    argv = shlex.split(hint)
    assert argv[-2] == "--prompt" and "generate" in argv
    if name == "letters":
        assert argv[-1] in ("", "it") and encode_prompt(tokenizer, config.data, argv[-1], True).size
        return
    assert argv[-1] == {"\n": "", "-": "", "it's\n$HOME": "it's", "\u2028": ""}.get(prompt, prompt)
    if prompt == "-x":
        assert generate(*argv[argv.index("generate") + 1 :], "--max_new_tokens", "3") != "" and generate.error == ""

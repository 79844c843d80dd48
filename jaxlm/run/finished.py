"""The closing lines of a run, and the answer to a command whose run is finished. Nothing here imports jax."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from jaxlm import data
from jaxlm.checkpoint import checksums, metrics_file, workdirs
from jaxlm.config import Config, UserError
from jaxlm.config.paths import steps_in
from jaxlm.data.prompts import encode_prompt
from jaxlm.data.sources.conversations import trains_on_answers
from jaxlm.run.console import Reporter


def answer(config: Config, workdir: Path, limited: bool = False) -> bool:
    """Prints the closing lines of a finished run from its files; returns False if anything is left to train or check.

    Args:
      limited: whether --max_minutes is given, which may have given the run fewer steps.

    Raises:
      UserError: workdir or data do not fit the configuration, or another run is at work in the workdir.
    """
    if not workdirs.holds_checkpoints(workdir):
        return False
    if limited:
        config = workdirs.with_given_steps(workdir, config)
    scores = _recorded(workdir, config)
    if scores is None:
        return False
    corpus = data.prepare(config)
    facts = workdirs.read_facts(workdir)
    known = facts["data_fingerprint"], facts["vocab_size"]
    if known != (corpus.fingerprint, corpus.vocab_size) or not workdirs.holds_tokenizer(workdir, corpus.tokenizer):
        return False
    with workdirs.Lock() as lock:
        lock.take(workdir)
    reporter = Reporter(config)
    reporter.say(f"finished: nothing left to train in {workdir}")
    reporter.evaluation(scores)
    close(reporter, config, workdir, corpus, scores)
    return True


def _recorded(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Returns the scores after the last step; None unless the run is finished, whole, and has this configuration."""
    if workdirs.check(workdir, config) is not None:
        return None
    metrics_file.check(workdir)
    newest = max(steps_in(workdir / "checkpoints"))
    if newest != config.steps:
        return None
    try:
        damaged = checksums.damage(workdir / "checkpoints" / str(newest))
    except OSError:
        return None
    return None if damaged else metrics_file.evaluations(workdir).get(newest)


def close(reporter: Reporter, config: Config, workdir: Path, corpus: data.Corpus, scores: dict[str, Any]) -> None:
    """Shows the score beside those of compressors, where the report is, and the command to type next."""
    bits = scores["eval_bits_per_byte"]
    whole = not config.eval.batches  # otherwise compressors and model would see different bytes
    if bits is not None and whole and config.eval.baselines and not reporter.console.quiet:
        baselines = data.compression_baselines(corpus)
        if baselines:
            reporter.comparison(baselines, bits)
    if (workdir / "report.html").is_file():
        reporter.say(f"report: {workdir / 'report.html'}", clock=False)
    reporter.say(f"next: {_next(config, corpus, shlex.quote(str(workdir)))}", clock=False)


def _next(config: Config, corpus: data.Corpus, workdir: str) -> str:
    """Returns a command that tries the model."""
    if corpus.tokenizer is None:
        return f"{command('evaluate')} --workdir {workdir}"
    chat = trains_on_answers(config.data)
    prompt = next(iter(config.eval.sample_prompt.splitlines()), "")
    try:
        encode_prompt(corpus.tokenizer, config.data, prompt, chat)
    except UserError:  # the prompt has characters outside the tokenizer's alphabet
        prompt = ""
    if prompt == "-" or not prompt.isprintable():  # "-" means stdin
        prompt = ""
    option = " --chat" * (chat and not config.model.encoder_layers)
    return f"{command('generate')} --workdir {workdir}{option} --prompt {shlex.quote(prompt)}"


def command(name: str) -> str:
    """Returns the command line that starts a jaxlm command from the current folder with this Python."""
    script = Path(sys.executable).with_name("jaxlm")
    if not script.is_file():  # not installed
        return f"{shlex.quote(_nearby(sys.executable, 'python'))} -m jaxlm {name}"
    return f"{shlex.quote(_nearby(str(script), 'jaxlm'))} {name}"


def _nearby(path: str, name: str) -> str:
    """Returns how to call a program from the current folder: its name if PATH finds it, else its shortest path."""
    if shutil.which(name) == path:
        return name
    return path if os.path.relpath(path).startswith("..") else os.path.relpath(path)

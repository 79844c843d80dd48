"""Samples text from a checkpoint, and shows it as it is generated."""

import argparse
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import MAX_FLOAT, MAX_INT, UserError, cli, show
from jaxlm.config.paths import user_path
from jaxlm.config.pretrained import read_step
from jaxlm.config.validate import MAX_SEED
from jaxlm.host import runtime

MEMORY = 8  # GB; most memory for keys, values and logits
TEXTS = ("--prompt", "--stop")  # options whose value may begin with a dash


def main(argv: list[str]) -> int:
    args = _parse(argv)
    prompt = _read_prompt(args)
    runtime.check_environment()

    from jaxlm.data.prompts import Continuation, encode_prompt, for_chats, make_ending, start_of
    from jaxlm.run.open_run import open_run

    run = open_run(user_path("--workdir", args.workdir), read_step("--step", args.step))
    tokenizer, data, model = run.tokenizer, run.config.data, run.config.model
    if tokenizer is None:
        raise UserError(f"--workdir {args.workdir}: the run has no tokenizer, so its tokens are not text")
    has_encoder = model.encoder_layers > 0
    own = for_chats(tokenizer, data) if args.chat or has_encoder else None
    if args.chat and own is None and not has_encoder:
        raise UserError(
            f"--chat: {args.workdir} was trained on texts, not on answers; allowed with data.messages_key or "
            "data.response_key, or a pretrained tokenizer that came with a template: --chat, otherwise --prompt alone"
        )
    try:
        ids = encode_prompt(tokenizer, own or data, prompt, own is not None)
    except UserError as error:
        raise UserError(f"--prompt {show(prompt)}: {error}") from error
    start = start_of(run.config, ids)
    seen = start.ids if start.prompt is None else start.prompt
    if len(seen) < len(ids):
        which, key = ("first", "model.encoder_len") if has_encoder else ("last", "seq_len")
        line = f"the prompt has {len(ids)} tokens; the model sees the {which} {len(seen)} of them ({key})"
        print(f"jaxlm: {line}", file=sys.stderr)
    _check_memory(args, run, len(start.ids), 0 if start.prompt is None else len(start.prompt))
    import jax
    import numpy as np

    from jaxlm.model.cross_attention import Prompts
    from jaxlm.model.generate import stream

    how = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    how["prompts"] = Prompts.repeated(start.prompt, args.num_samples)
    begins = np.tile(start.ids, (args.num_samples, 1))
    blocks = stream(run.model, run.params, begins, jax.random.key(args.seed), **how)
    ending = make_ending(tokenizer, own or data, args.stop)
    rows = [Continuation(tokenizer, start.ids, ending) for _ in range(args.num_samples)]
    try:
        _show(blocks, rows, "" if args.chat or has_encoder else prompt)
    except BrokenPipeError:  # the reader left, such as `| head`: discards the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _show(blocks: Iterator[Any], rows: list[Any], prompt: str) -> None:
    """Writes a single sample as it grows; several in order, each when it and the ones before it are complete."""
    num_samples = len(rows)
    texts, shown = [prompt] * num_samples, 0

    def show_done() -> None:
        nonlocal shown
        while num_samples > 1 and shown < num_samples and rows[shown].ended:
            _write(f"--- sample {shown + 1} ---\n{texts[shown]}\n")
            shown += 1

    if num_samples == 1:
        _write(prompt)
    for block in blocks:
        for i, row in enumerate(rows):
            text = row.add(block[i].tolist())
            texts[i] += text
            if num_samples == 1:
                _write(text)
        show_done()
        if all(row.ended for row in rows):
            break
    for i, row in enumerate(rows):
        texts[i] += (text := row.finish())
        if num_samples == 1:
            _write(text + "\n")
    show_done()


def _write(text: str) -> None:
    sys.stdout.write(text.encode(errors="replace").decode())
    sys.stdout.flush()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="jaxlm generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="the run, e.g. runs/base")
    parser.add_argument(
        "--prompt",
        help="start of the text; - reads stdin (default: stdin if it is a pipe or file, else the start of a document)",
    )
    parser.add_argument("--prompt_file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="for a run trained on answers, or a pretrained model that came with a chat template: the prompt is the"
        " user's message, formatted with the template; shows the answer alone (always so with an encoder)",
    )
    parser.add_argument("--num_samples", type=int, default=1, help="number of samples (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="most tokens of each sample (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token (default: 0.8)")
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample among the k most probable tokens; 0 = all (default: 0)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample among the most probable tokens that together have this probability (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--step", help="checkpoint to use: its step, or best by validation loss (default: the newest)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sample before this text; may be given more than once",
    )
    joined = []  # --prompt -x is an option and its value, even if the value begins with a dash
    for argument in argv:
        if joined and joined[-1] in TEXTS:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    args = parser.parse_args(joined)
    for name, ok, allowed in (
        ("num_samples", 1 <= args.num_samples <= MAX_INT, f"1 to {MAX_INT}"),
        ("max_new_tokens", 1 <= args.max_new_tokens <= MAX_INT, f"1 to {MAX_INT}"),
        ("temperature", 0 <= args.temperature <= MAX_FLOAT, f"0 to {MAX_FLOAT}"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "more than 0, at most 1"),
        ("seed", 0 <= args.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
        ("stop", all(args.stop), "texts that are not empty"),
    ):
        if not ok:
            raise UserError(f"--{name} is {show(getattr(args, name))}; allowed: {allowed}")
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError(f"--prompt_file is {show(args.prompt_file)}; allowed: none together with --prompt")
    return args


def _read_prompt(args: argparse.Namespace) -> str:
    """Returns the prompt from the command line, a file or stdin; from the last two without the final newline."""
    piped = args.prompt is None and args.prompt_file is None and _is_piped()
    if args.prompt != "-" and args.prompt_file is None and not piped:
        if (args.prompt or "").encode(errors="ignore").decode() != (args.prompt or ""):
            raise UserError(f"--prompt is {show(args.prompt)}: not UTF-8; allowed: a text")
        return args.prompt or ""
    name = "--prompt -" if args.prompt_file is None else f"--prompt_file {args.prompt_file}"
    if piped:
        print("jaxlm: the prompt is read from stdin; --prompt TEXT replaces it", file=sys.stderr)
    try:
        if args.prompt_file is None:
            content = sys.stdin.buffer.read()
        else:
            content = Path(user_path("--prompt_file", args.prompt_file)).read_bytes()
        return content.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"{name}: unreadable ({error.strerror}); allowed: a file of text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}; allowed: a text") from None


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file, as in `echo def | jaxlm generate …`."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _check_memory(args: argparse.Namespace, run: Any, prompt_tokens: int, encoded: int) -> None:
    import jax

    from jaxlm.model.generate import CHUNK

    total = prompt_tokens + args.max_new_tokens
    length = min(total, run.model.max_positions or total)
    cache = jax.eval_shape(lambda: run.model.init_cache(args.num_samples, length, encoded))
    logits = 4 * args.num_samples * min(prompt_tokens, CHUNK) * run.vocab_size
    scores = 8 * args.num_samples * run.config.model.num_heads * encoded**2  # of the encoder, before and after softmax
    gigabytes = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) + logits + scores) / 1e9
    if gigabytes > MEMORY:
        raise UserError(
            f"--num_samples is {args.num_samples} and --max_new_tokens {args.max_new_tokens}, after a prompt of"
            f" {encoded or prompt_tokens} tokens: {gigabytes:.0f} GB; allowed: numbers that need at most {MEMORY} GB"
        )

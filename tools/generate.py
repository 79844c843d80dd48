"""Samples text from a checkpoint."""

if __name__ == "__main__":  # before the other imports, so that a signal is heard while they take their time
    from jaxlm import startup

    startup.tool()


import sys

from jaxlm import cli, runtime
from jaxlm.config import MAX_FLOAT, UserError, show
from jaxlm.main import exit_code
from jaxlm.paths import user_path
from jaxlm.validate import MAX_INT, MAX_SEED

MEMORY = 8  # GB of keys, values and logits


def main() -> int:
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="the run, e.g. runs/base")
    parser.add_argument("--prompt", default="", help="what the text starts from (default: the start of a document)")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="sample among the k most probable tokens; 0 = all")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="sample among the tokens that make up this probability"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    args = parser.parse_args()

    for name, ok, allowed in (
        ("num_samples", 1 <= args.num_samples <= MAX_INT, f"1 to {MAX_INT}"),
        ("max_new_tokens", 1 <= args.max_new_tokens <= MAX_INT, f"1 to {MAX_INT}"),
        ("temperature", 0 <= args.temperature <= MAX_FLOAT, f"0 to {MAX_FLOAT}"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "more than 0, at most 1"),
        ("seed", 0 <= args.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
    ):
        if not ok:
            raise UserError(f"--{name} is {show(getattr(args, name))}; allowed: {allowed}")

    from jaxlm.restore import open_run

    run = open_run(user_path("--workdir", args.workdir), args.step)
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise UserError(f"--workdir {args.workdir}: trained on bare tokens; without a tokenizer there is no text")
    import jax
    import numpy as np

    from jaxlm.generate import CHUNK, generate

    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode([args.prompt])[0]]).astype(np.int32)
    seq_len, position = run.config.seq_len, run.config.model.position
    if position != "rope" and len(prompt) + args.max_new_tokens > seq_len:
        raise UserError(
            f"--max_new_tokens is {args.max_new_tokens}; allowed: at most {seq_len - len(prompt)}, since the prompt has"
            f" {len(prompt)} tokens and model.position={position} ends at seq_len = {seq_len}"
        )
    cache = jax.eval_shape(lambda: run.model.init_cache(args.num_samples, len(prompt) + args.max_new_tokens))
    logits = 4 * args.num_samples * min(len(prompt), CHUNK) * run.vocab_size
    gigabytes = (sum(x.size * x.dtype.itemsize for x in cache) + logits) / 1e9
    if gigabytes > MEMORY:
        raise UserError(
            f"--num_samples is {args.num_samples} and --max_new_tokens {args.max_new_tokens}, after a prompt of"
            f" {len(prompt)} tokens: {gigabytes:.0f} GB; allowed: what needs at most {MEMORY} GB"
        )
    tokens = generate(
        run.model, run.params, np.tile(prompt, (args.num_samples, 1)), jax.random.key(args.seed),
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    for i, row in enumerate(np.asarray(tokens)):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        text = tokenizer.decode(np.concatenate([prompt[1:], row]))
        sys.stdout.write(text.encode(errors="replace").decode() + "\n")
    return 0


if __name__ == "__main__":
    runtime.leave(exit_code(main))

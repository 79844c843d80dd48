"""Makes a workdir of a Hugging Face model, for generation, scoring and fine-tuning.

    jaxlm import-hf SRC WORKDIR [--seq_len N] [--dtype bfloat16]

The last line on stdout is one JSON object.
"""

import json

from jaxlm.config import cli
from jaxlm.config.paths import user_path


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="jaxlm import-hf",
        description="Make a workdir of a Hugging Face model: GPT-2, Llama 2 and 3, SmolLM2, Mistral, Qwen 2, 2.5 and 3,"
        " Gemma 2 and 3 (text), Phi-3 and Phi-4-mini.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder with config.json, safetensors and a tokenizer")
    parser.add_argument("workdir", metavar="WORKDIR", help="a new folder")
    parser.add_argument("--seq_len", type=int, metavar="N", help="a shorter context than the model's")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the parameters (default: float32)")
    args = parser.parse_args(argv)

    from jaxlm.interop.importing import import_model

    workdir = user_path("WORKDIR", args.workdir)
    found = import_model(user_path("SRC", args.source), workdir, args.seq_len, args.dtype)
    print(f"{workdir}: {found.parameters / 1e6:.1f} M parameters, {found.vocab_size} tokens")
    print(f"jaxlm generate --workdir {workdir} --prompt TEXT; checkpoint.resume={workdir} trains it")
    print(json.dumps({"workdir": str(workdir), "parameters": found.parameters, "vocab_size": found.vocab_size}))
    return 0

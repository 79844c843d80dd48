"""Writes a run's model as a folder that `transformers` loads.

    jaxlm export-hf WORKDIR DST [--step N|best] [--dtype bfloat16]

The last line on stdout is one JSON object.
"""

import json

from jaxlm.config import cli, files
from jaxlm.config.paths import user_path
from jaxlm.config.pretrained import read_step


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="jaxlm export-hf",
        description="Write a run's model as a folder that transformers loads: config.json, safetensors, tokenizer.",
        allow_abbrev=False,
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="the run, e.g. runs/base")
    parser.add_argument("destination", metavar="DST", help="a new folder")
    parser.add_argument("--step", help="checkpoint to use: its step, or best by validation loss (default: the newest)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: float32)")
    parser.add_argument("--adapter", action="store_true", help="write LoRA alone, as peft loads it; else it is merged")
    parser.add_argument("--base", help="with --adapter: name or path of the original model, for adapter_config.json")
    args = parser.parse_args(argv)
    if args.base is not None and not args.adapter:
        parser.error("--base: allowed with --adapter only")
    if args.adapter and args.dtype:
        parser.error("--dtype: not allowed with --adapter, which is float32")
    dtype = args.dtype or "float32"
    step, workdir = read_step("--step", args.step), user_path("WORKDIR", args.workdir)
    why = "transformers' architectures that are written here are decoders"
    files.check_decoder(str(workdir), files.load_workdir(workdir), why)

    from jaxlm.data.tokenizers.hf import HfTokenizer
    from jaxlm.interop import own_model
    from jaxlm.interop.adapters import export_adapter
    from jaxlm.interop.exporting import export_model, nearest
    from jaxlm.run.open_run import open_run

    run, destination = open_run(workdir, step), user_path("DST", args.destination)
    if args.adapter:
        count = export_adapter(run, destination, args.base)
        print(f"{destination}: LoRA of {count} layers, step {run.step}")
        print(json.dumps({"folder": str(destination), "adapted_layers": count, "step": run.step}))
        return 0
    architecture = export_model(run, destination, dtype)
    print(f"{destination}: {architecture}, step {run.step}, {dtype}")
    if architecture == own_model.FAMILY.architecture:
        print(f"no architecture of transformers has this model; {nearest(run.config.model, run.config.seq_len)}")
        print(f"{own_model.MODELING.name} beside the weights computes it: load it with trust_remote_code=True")
    if run.tokenizer is None:
        print(f"without a tokenizer: the run has token ids of its own (data.source={run.config.data.source})")
    elif architecture == "Qwen2ForCausalLM" and not isinstance(run.tokenizer, HfTokenizer):
        print("transformers' AutoTokenizer changes it for this architecture; PreTrainedTokenizerFast loads it as it is")
    print(json.dumps({"folder": str(destination), "architecture": architecture, "step": run.step}))
    return 0

"""Scores a checkpoint on its whole validation set; the last line of output is one JSON object."""

import json

from jaxlm import cli, runtime
from jaxlm.config import UserError, flatten
from jaxlm.main import exit_code
from jaxlm.paths import user_path
from jaxlm.pretrained import read_step


def main() -> int:
    parser = cli.Parser(
        description=__doc__, allow_abbrev=False, epilog="--config.data.… scores other data with the run's tokenizer."
    )
    parser.add_argument("--workdir", required=True, help="the run, e.g. runs/base")
    parser.add_argument("--step", help="of the checkpoint, or best, by validation loss (default: the newest)")
    args, overrides = parser.parse_known_args()
    workdir = user_path("--workdir", args.workdir)
    trained = flatten(cli.load_workdir(workdir))
    config = cli.load_workdir(workdir, overrides)
    for key, value in flatten(config).items():
        if value != trained[key] and not key.startswith(("data.", "parallel.", "batch_size", "loss.chunk")):
            raise UserError(
                f"{key} is {value!r}; allowed: {trained[key]!r}, as in the run; only data.*, parallel.*, batch_size and"
                " loss.chunk can be set here"
            )
    config.eval.batches = 0
    runtime.check_batch(config, config.parallel.devices or 1, 1)
    runtime.configure_jax(config, 1)

    from jaxlm.restore import open_run, score

    run = open_run(workdir, read_step("--step", args.step))
    print(json.dumps({"step": run.step, **score(run, config)}))
    return 0


if __name__ == "__main__":
    runtime.relaunch_with_huge_pages()
    runtime.leave(exit_code(main))

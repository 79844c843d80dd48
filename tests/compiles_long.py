"""The trainer with a step that takes minutes to compile."""

import sys
import time
from typing import Any

from jaxlm.host import runtime, startup
from jaxlm.host.exit_codes import exit_code
from jaxlm.main import run
from jaxlm.train import step as train_step

make = train_step.make_train_step


def make_slowly(*args: Any) -> Any:
    step = make(*args)

    def traced(*inputs: Any) -> Any:
        print("compiling", file=sys.stderr, flush=True)
        time.sleep(300)
        return step(*inputs)

    return traced


if __name__ == "__main__":
    startup.trainer()
    train_step.make_train_step = make_slowly
    runtime.leave(exit_code(lambda: run(sys.argv[1:])))

"""One host of tools/netbench.py.

Arguments: strategies, a configuration's file, its keys as JSON, the coordinator, the number of processes, and the index
of this one. For each line of input, `STRATEGY STEPS`, it prints the seconds per step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    names, file, keys, coordinator, count, index = sys.argv[1:]
    import jax
    import numpy as np

    from jaxlm.config import files
    from jaxlm.host import runtime
    from jaxlm.host.join import join
    from jaxlm.model import make_model
    from jaxlm.train import step as train_step
    from jaxlm.train.placement import Placement

    def config_of(reduce: str) -> Any:
        flat = json.loads(keys) | {"parallel.reduce": reduce, "parallel.devices": 1}
        return files.load(Path(file), [f"--config.{k}={v}" for k, v in flat.items()])

    runtime.configure_jax(config_of("pmean"), int(count))
    join(coordinator, int(count), int(index))
    devices = runtime.choose_devices(config_of("pmean"))
    built: dict[str, Any] = {}
    for name in json.loads(names):
        config = config_of(name)
        model = make_model(config.model, config.data.vocab_size, config.seq_len)
        placement = Placement(config, model, devices)
        step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, devices), devices)
        rng = np.random.default_rng(int(index))
        shape = (1, config.batch_size // len(devices), config.seq_len)
        batch = {k: rng.integers(0, config.data.vocab_size, shape, dtype=np.int32) for k in ("inputs", "targets")}
        built[name] = [step, placement.initial(), jax.device_put(batch, placement.batch)]
    for line in sys.stdin:
        name, number = line.split()
        step, state, batch = built[name]
        start = time.perf_counter()
        for _ in range(int(number)):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        jax.block_until_ready(state)
        built[name][1] = state
        print("\nseconds", (time.perf_counter() - start) / int(number), flush=True)


if __name__ == "__main__":
    main()

"""Other trainers' steps beside ours, each in a process of its own that makes steps on request."""

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jaxlm.config import Config, UserError
from jaxlm.host import memory, runtime, signals

# What the decoder of bench_torch.py can be: {key: values}
TORCH = {
    "model.encoder_layers": (0,),
    "model.activation": ("gelu", "swiglu"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.position": ("learned", "rope"),
    "model.dtype": ("float32", "bfloat16"),
    "model.key_offset": (False,),
    "model.dropout": (0.0,),
    "model.logit_softcap": (0.0,),
    "model.head_dim": (0,),
    "model.norm_eps": (0.0,),
    "model.post_norms": (False,),
    "model.rope_fraction": (1.0,),
    "model.rope_scaling": ("none",),
    "model.window": (0,),
    "model.score_dim": (0,),
    "model.attention_softcap": (0.0,),
    "model.qkv_bias": (False,),
    "model.scale_embeddings": (False,),
    "model.lora_rank": (0,),
    "optim.name": ("adamw",),
    "optim.freeze": ("",),
}


class Peer:
    """A process that reads a number of steps and prints the seconds that each took.

    Raises:
      UserError: the process fails.
    """

    def __init__(self, option: str, command: list[Any]):
        self._option = option
        self.peak_bytes = 0  # of GPU or process; 0 = unknown
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process runs
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        signals.at_stop(self._process.kill)
        self.step(1)  # compiles, if it does
        self.step(max(1, min(4, int(20 / self.step(1)))))  # for at most 20 seconds

    def step(self, steps: int) -> float:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            while not (line := self._process.stdout.readline()).startswith("seconds "):
                if not line:
                    raise OSError
        except OSError as error:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it ended early"])[-1]
            self.close()
            raise UserError(f"--{self._option}: its process failed: {last}; allowed: a Python with torch") from error
        _, seconds, *peak = line.split()
        self.peak_bytes = int(peak[0]) if peak and int(peak[0]) else memory.peak_bytes(self._process.pid)
        return float(seconds)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):  # what it did not read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def nanogpt(checkout: Path, python: str, config: Config, vocab_size: int) -> Peer:
    """nanoGPT's model and optimizer, with the same sizes."""
    m = config.model
    if not (checkout / "model.py").is_file():
        raise UserError(f"--nanogpt {checkout}: no model.py in it; allowed: a checkout of nanoGPT")
    sizes = {
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_embd": m.d_model,
        "block_size": config.seq_len,
        "vocab_size": vocab_size,
        "bias": m.use_bias,
        "dropout": m.dropout,
    }
    script = Path(__file__).with_name("bench_nanogpt.py")
    return Peer("nanogpt", [python, script, checkout, json.dumps(sizes), str(config.batch_size), _precision(config)])


def check_torch(config: Config) -> None:
    """Raises UserError unless bench_torch.py has the same model, trained in the same way."""
    for key, allowed in TORCH.items():
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) not in allowed:
            raise UserError(f"{key} is {value}; allowed with --torch: {', '.join(str(v) or 'none' for v in allowed)}")
    if config.parallel.devices > 1:
        raise UserError(f"parallel.devices is {config.parallel.devices}; allowed with --torch: 1")


def pytorch(python: str, config: Config, vocab_size: int, parameters: int) -> Peer:
    """The same model in PyTorch, with as many parameters, on one device."""
    m, steps = config.model, config.optim.accum_steps
    names = ("num_layers", "d_model", "num_heads", "activation", "norm", "position", "use_bias", "tie_embeddings")
    sizes = {name: getattr(m, name) for name in (*names, "qk_norm", "rope_theta", "dtype")}
    sizes |= {"num_kv_heads": m.kv_heads, "d_ff": m.mlp_width, "seq_len": config.seq_len}
    sizes["vocab_size"] = -(-vocab_size // m.vocab_multiple) * m.vocab_multiple
    sizes |= {
        "parameters": parameters,
        "accum_steps": steps,
        "rows": config.batch_size // steps,
        "precision": _precision(config),
    }
    return Peer("torch", [python, Path(__file__).with_name("bench_torch.py"), json.dumps(sizes)])


def _precision(config: Config) -> str:
    """PyTorch's name for the precision of float32 products: `medium` rounds operands to bfloat16."""
    return "medium" if runtime.rounds_products(config) else "highest"

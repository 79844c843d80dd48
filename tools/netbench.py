"""Times a step between hosts on a slow network, for each reduction of gradients, beside PyTorch's DDP.

The hosts are network namespaces of this machine (Linux, as root), joined by a bridge. Each sends at most --mbit, with a
delay of --delay_ms, and has one core; hosts share cores if there are fewer cores than hosts. On each host runs one
process with the trainer's step on one CPU device and, with --vs ddp, one with PyTorch's DistributedDataParallel, a GPT
of the same sizes and AdamW. What is compared takes turns, in another order every round; the results are medians. The
last line of output is one JSON object.

Example: sudo python tools/netbench.py --mbit 200 --vs ddp --ddp_python path/to/python-with-torch
"""

if __name__ == "__main__":  # before the slow imports, so that signals are handled during them
    from jaxlm.host import startup

    startup.tool("netbench")


import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from jaxlm.config import Config, UserError, cli, files, flatten, key_types
from jaxlm.config.paths import user_path
from jaxlm.host import runtime, signals
from jaxlm.host.exit_codes import exit_code
from jaxlm.host.startup import HUGE_PAGES

ROOT = Path(__file__).parents[1]
STRATEGIES: tuple[str, ...] = get_args(key_types()["parallel.reduce"])
OVERLAP = "+overlap"  # after the name of a strategy: with parallel.overlap
PORT = 29500
OWN = ("batch_size", "data.", "parallel.reduce", "parallel.overlap")  # keys that netbench sets by itself


def main() -> int:
    parser = cli.Parser(
        description=__doc__, allow_abbrev=False, epilog="--config.KEY=VALUE sets a key, as for training."
    )
    parser.add_argument(
        "--config", default=str(ROOT / "configs/gpt_10m.py"), metavar="FILE", help="a configuration (default: gpt_10m)"
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each host per step (default: 256)")
    parser.add_argument("--mbit", type=float, default=200, help="Mbit/s that a host can send (default: 200)")
    parser.add_argument("--delay_ms", type=float, default=0, help="milliseconds of delay between hosts (default: 0)")
    parser.add_argument(
        "--reduce", default=",".join(STRATEGIES), metavar="A,B", help="strategies, also as A+overlap (default: all)"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps per round (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--vs", choices=["ddp"], help="a peer to compare with")
    parser.add_argument(
        "--ddp_python", default=sys.executable, metavar="PYTHON", help="a Python with torch (default: this one)"
    )
    args, overrides = parser.parse_known_args()
    config = _config(args, overrides)
    names = [name.strip() for name in args.reduce.split(",")]
    if wrong := [name for name in names if name.removesuffix(OVERLAP) not in STRATEGIES]:
        raise UserError(
            f"--reduce has {wrong[0]!r}; allowed: {', '.join(STRATEGIES)}, also with {OVERLAP}, separated by commas"
        )
    limits = {"hosts": (2, 250), "steps": (1, 10**6), "rounds": (1, 10**6), "mbit": (0.01, 1e6), "delay_ms": (0, 1e4)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: {least} to {most:g}")
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise UserError("netbench needs Linux, root and iproute2 (ip, tc): it makes network namespaces")

    with (
        network(args.hosts, args.mbit, args.delay_ms) as hosts,
        tempfile.TemporaryFile("w+") as errors,
        contextlib.ExitStack() as stack,
    ):
        parties, runs = start(args, config, names, hosts, errors, stack)
        times: dict[str, list[float]] = {label: [] for label, _, _ in runs}
        for _, party, name in runs:
            parties[party].seconds(name, 2)  # compiles, and makes the allocations that happen once
        for i in range(args.rounds):
            for label, party, name in runs[:: 1 if i % 2 else -1]:
                times[label].append(parties[party].seconds(name, args.steps))
            print(f"round {i + 1}/{args.rounds} · " + " · ".join(f"{k} {v[-1]:.3f} s" for k, v in times.items()))
    print(json.dumps(summary(args, times)))
    return 0


def start(
    args: Any, config: Config, names: list[str], hosts: list[str], errors: Any, stack: contextlib.ExitStack
) -> tuple[dict[str, "Party"], list[tuple[str, str, str]]]:
    """Starts the processes, which end with the stack. Returns them, and the runs: (label, party, strategy's name)."""
    worker, keys = str(ROOT / "tools/netbench_worker.py"), flatten(config)
    parties: dict[str, Party] = {}
    runs = []
    # Overlap needs processes of its own, because XLA's flags hold for a whole process.
    for overlap in (False, True):
        if mine := [name for name in names if name.endswith(OVERLAP) == overlap]:
            reductions = json.dumps([name.removesuffix(OVERLAP) for name in mine])
            own = json.dumps(keys | {"parallel.overlap": overlap})
            ours = [sys.executable, worker, reductions, args.config, own]
            # Two threads on one core, so that a waiting exchange does not hold up the computation.
            env = {"GLIBC_TUNABLES": HUGE_PAGES, "NPROC": "2"}
            parties[OVERLAP * overlap] = stack.enter_context(Party(hosts, ours, len(parties), env, errors))
            runs += [(f"jaxlm {name}", OVERLAP * overlap, name.removesuffix(OVERLAP)) for name in mine]
    if args.vs:
        m = config.model
        sizes = {
            "layers": m.num_layers,
            "d_model": m.d_model,
            "heads": m.num_heads,
            "seq_len": config.seq_len,
            "rows": config.batch_size // args.hosts,
            "vocab": config.data.vocab_size,
            "precision": "medium" if runtime.rounds_products(config) else "highest",
        }
        peer = [args.ddp_python, str(ROOT / "tools/netbench_ddp.py"), json.dumps(sizes)]
        parties["ddp"] = stack.enter_context(Party(hosts, peer, len(parties), {}, errors))
        runs += [("ddp float32", "ddp", "float32"), ("ddp fp16", "ddp", "fp16")]
    return parties, runs


def _config(args: Any, overrides: list[str]) -> Config:
    for override in overrides:
        if override.removeprefix("--config.").startswith(OWN):
            raise UserError(f"{override}: netbench sets this key; allowed: --tokens, --reduce, and any other key")
    config = files.load(user_path("--config", args.config), [*overrides, "--config.data.source=synthetic"])
    if args.tokens < config.seq_len or args.tokens % config.seq_len:
        raise UserError(f"--tokens is {args.tokens}; allowed: a multiple of seq_len = {config.seq_len}")
    config.batch_size = args.hosts * args.tokens // config.seq_len
    config.data.vocab_size = 65
    return config


def summary(args: Any, times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns medians, and medians of the ratios within each round."""
    result: dict[str, Any] = {"hosts": args.hosts, "mbit": args.mbit, "delay_ms": args.delay_ms, "tokens": args.tokens}
    result["seconds"] = {name: statistics.median(t) for name, t in times.items()}
    for peer in ("ddp float32", "ddp fp16"):
        if peer in times:
            result[f"over_{peer.replace(' ', '_')}"] = {
                name: statistics.median(a / b for a, b in zip(t, times[peer], strict=True)) for name, t in times.items()
            }
    return result


@contextlib.contextmanager
def network(hosts: int, mbit: float, delay_ms: float) -> Iterator[list[str]]:
    """Makes namespaces with shaped traffic between them. Yields their names."""
    names = [f"jaxlm{os.getpid()}h{i}" for i in range(hosts)]
    bridge = f"jb{os.getpid() % 10**8}"
    etc = [Path("/etc/netns") / name for name in names]
    making = threading.RLock()

    def run(*words: str, check: bool = True) -> None:
        with making:
            done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
        if check and done.returncode:
            raise UserError(f"netbench cannot make its network: {' '.join(words)}: {done.stderr.strip()}")

    def remove() -> None:
        with making:
            for name, folder in zip(names, etc, strict=True):
                run("ip", "netns", "del", name, check=False)
                shutil.rmtree(folder, ignore_errors=True)
            run("ip", "link", "del", bridge, check=False)

    def remove_at_stop() -> None:
        making.acquire()  # never released, so nothing more is made
        remove()

    signals.at_stop(remove_at_stop)
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for i, name in enumerate(names):
            run("ip", "netns", "add", name)
            # Gloo binds to the address that the host's own name resolves to.
            etc[i].mkdir(parents=True)
            (etc[i] / "hosts").write_text(f"127.0.0.1 localhost\n{address(i)} {os.uname().nodename}\n")
            outer = f"{bridge}-{i}"[-15:]
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", outer, "master", bridge, "up")
            inside = ("ip", "netns", "exec", name)
            run(*inside, "ip", "addr", "add", f"{address(i)}/24", "dev", "eth0")
            run(*inside, "ip", "link", "set", "eth0", "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            shape = (*inside, "tc", "qdisc", "add", "dev", "eth0")
            run(*shape, *f"root handle 1: tbf rate {mbit}mbit burst 256kb latency 50ms".split())
            if delay_ms:
                run(*shape, *f"parent 1: handle 10: netem delay {delay_ms}ms limit 100000".split())
        yield names
    finally:
        remove()


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


class Party:
    """Processes, one on each host, that make steps together on request."""

    def __init__(self, hosts: list[str], command: list[str], offset: int, env: dict[str, str], errors: Any):
        cores = sorted(os.sched_getaffinity(0))
        self._errors, self._processes = errors, []
        env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"} | env
        for i, host in enumerate(hosts):
            inside = ["ip", "netns", "exec", host, "taskset", "-c", str(cores[i % len(cores)])]
            place = [f"{address(0)}:{PORT + offset}", str(len(hosts)), str(i)]
            process = subprocess.Popen(
                [*inside, *command, *place],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=env,
            )
            self._processes.append(process)
            signals.at_stop(process.kill)

    def __enter__(self) -> "Party":
        return self

    def __exit__(self, *error: Any) -> None:
        for p in self._processes:
            p.kill()
            p.wait()

    def seconds(self, name: str, steps: int) -> float:
        """Returns the seconds of a step on the slowest host."""
        try:
            for p in self._processes:
                assert p.stdin
                p.stdin.write(f"{name} {steps}\n")
                p.stdin.flush()
            return max(self._answer(p) for p in self._processes)
        except OSError as error:
            self._errors.seek(0)
            last = self._errors.read().strip().split("\n")[-1]
            raise UserError(f"a process of {name} ended: {last or error}") from error

    def _answer(self, process: subprocess.Popen[str]) -> float:
        assert process.stdout
        while not (line := process.stdout.readline()).startswith("seconds "):  # skips lines that Gloo prints
            if not line:
                raise OSError("no answer")
        return float(line.split()[1])


if __name__ == "__main__":
    runtime.leave(exit_code(main, "netbench"))

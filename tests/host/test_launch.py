"""Real launchers start runs: Slurm, Open MPI and sshd on this machine, and the environment that Kubernetes sets."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import LIMIT, flags, free_port, numbers
from tests.runs import CONFIG, ROOT, lines

pytestmark = [pytest.mark.slow, pytest.mark.launchers]
COMMAND = [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), *flags("steps=40")]
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
HOST = socket.gethostname().split(".")[0]


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [p for p in programs if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin")]
    return pytest.mark.skipif(bool(missing) or os.geteuid() != 0, reason=f"needs root and {', '.join(programs)}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the metrics of one process with four devices, without timings."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([*COMMAND, "--workdir", str(workdir)], env=env, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    return numbers(workdir)


def check_numbers(workdir: Path, expected: list[dict[str, Any]]) -> None:
    found = numbers(workdir)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def wait_for(what: Any) -> Any:
    deadline = time.monotonic() + LIMIT
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Starts a Slurm cluster on this machine alone, and yields the environment in which its commands find it."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    socket_path = folder / "munge.socket"
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={HOST}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthInfo=socket={socket_path},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
NodeName={HOST} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
""")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"} | DEVICES
    munged = ["munged", "-F", "--force", f"--socket={socket_path}", f"--key-file={folder}/munge.key",
              f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
              f"--log-file={folder}/munged.log"]  # fmt: skip
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", HOST]):
            daemons.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            if command is munged:
                wait_for(socket_path.exists)
        wait_for(
            lambda: (
                "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True).stdout
            )
        )
        yield env
    finally:
        subprocess.run(["scancel", "-u", "root"], env=env, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


@needs("srun", "slurmctld", "slurmd", "munged")
def test_srun_needs_no_further_options(slurm: dict[str, str], alone: list[dict[str, Any]], tmp_path: Path):
    command = ["srun", "-n2", "--overcommit", *COMMAND, "--workdir", str(tmp_path / "run")]
    found = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert found.returncode == 0, found.stderr
    assert "4 x cpu" in found.stdout
    check_numbers(tmp_path / "run", alone)


@needs("sbatch", "slurmctld", "slurmd", "munged")
def test_sbatch_resumes_after_a_preemption(slurm: dict[str, str], tmp_path: Path):
    """A job that Slurm stops is queued again by the batch file, resumes, and ends with no step done twice."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    long = [*flags("steps=1500", "eval.every_steps=0", "checkpoint.every_steps=100000", "log.every_steps=100")]
    command = ["sbatch", "--parsable", "--nodes=1", "--overcommit", f"--output={log}",
               str(ROOT / "tools/launch/slurm.sbatch"), "--config", str(CONFIG), *long,
               "--workdir", str(workdir)]  # fmt: skip
    env = slurm | {"JAXLM_PYTHON": sys.executable}
    job = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    wait_for(lambda: any(m["step"] >= 100 for m in lines(workdir)))
    # Slurm sends this when a job is preempted, or when its time is nearly up.
    subprocess.run(["scancel", "--signal=TERM", job], env=env, check=True)

    def state() -> str:
        shown = subprocess.run(
            ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], env=env, capture_output=True, text=True
        )
        return shown.stdout.strip()

    wait_for(lambda: "queued again" in log.read_text())
    wait_for(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"))
    text = log.read_text()
    assert state() == "COMPLETED", text
    assert "restart 1" in text and "resumes after step" in text, text
    steps = [m["step"] for m in lines(workdir) if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == 1500


@needs("sbatch", "slurmctld", "slurmd", "munged")
def test_an_array_trains_the_points_of_a_sweep(slurm: dict[str, str], tmp_path: Path):
    folder, script = tmp_path / "sweep", tmp_path / "array.sbatch"
    sweep = [sys.executable, "-m", "jaxlm", "sweep", "--workdir", str(folder)]
    create = [*sweep, "--config", str(CONFIG), *flags("steps=20"), "--grid", "seed=0,1", "--slurm", str(script)]
    subprocess.run(create, env=slurm, cwd=ROOT, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    command = ["sbatch", "--wait", "--overcommit", str(script)]
    subprocess.run(command, env=slurm, cwd=ROOT, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    logs = [log.read_text() for log in sorted(folder.glob("slurm-*.log"))]
    assert len(logs) == 2 and all("restart 0" in log for log in logs), logs
    done = subprocess.run([*sweep, "--table"], env=slurm, cwd=ROOT, capture_output=True, text=True, check=True)
    points = json.loads(done.stdout.splitlines()[-1])["points"]
    assert [(p["state"], p["exit"], p["steps"]) for p in points] == [("done", 0, 20)] * 2


@needs("mpirun")
def test_mpirun_needs_no_further_options(alone: list[dict[str, Any]], tmp_path: Path):
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        *COMMAND,
        "--workdir",
        str(tmp_path / "run"),
    ]
    found = subprocess.run(command, env=os.environ | DEVICES, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert found.returncode == 0, found.stderr
    check_numbers(tmp_path / "run", alone)


def test_the_environment_of_an_indexed_job_is_sufficient(alone: list[dict[str, Any]], tmp_path: Path):
    """Two processes join with the variables of tools/launch/jobset.yaml, apart from the address."""
    [job] = yaml.safe_load((ROOT / "tools/launch/jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    said = {e["name"]: e["value"] for e in container["env"]}
    assert (
        int(said["JOB_COMPLETIONS"]) == job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"]
    )
    said |= {"JOB_COMPLETIONS": "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"} | DEVICES
    command = [*COMMAND, "--workdir", str(tmp_path / "run")]
    pods = [
        subprocess.Popen(command, env=os.environ | said | {"JOB_COMPLETION_INDEX": str(i)}, stdout=subprocess.DEVNULL)
        for i in range(2)
    ]
    assert [pod.wait(LIMIT) for pod in pods] == [0, 0]
    check_numbers(tmp_path / "run", alone)


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Starts sshd, and yields the environment in which tools/launch/ssh.sh reaches this machine."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    port, program = free_port(), shutil.which("sshd", path="/usr/sbin") or ""
    options = [f"HostKey={tmp_path}/host", f"AuthorizedKeysFile={tmp_path}/user.pub", "StrictModes=no", "PidFile=none",
               "UsePAM=no", "ListenAddress=127.0.0.1", f"Port={port}", "PermitRootLogin=yes",
               "AcceptEnv=XLA_FLAGS"]  # fmt: skip
    daemon = subprocess.Popen(
        [program, "-D", "-e", "-f", "/dev/null", *[f"-o{o}" for o in options]], stderr=subprocess.DEVNULL
    )
    options = [f"-p {port}", f"-i {tmp_path}/user", "-o StrictHostKeyChecking=no", "-o UserKnownHostsFile=/dev/null",
               "-o LogLevel=ERROR", "-o SendEnv=XLA_FLAGS"]  # fmt: skip
    yield os.environ | DEVICES | {"SSH_OPTIONS": " ".join(options), "PORT": str(free_port())}
    daemon.kill()
    daemon.wait()


@needs("sshd", "ssh")
@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="tools/launch/ssh.sh runs the checkout's .venv")
def test_ssh_stops_all_hosts_or_runs_to_the_end(ssh: dict[str, str], alone: list[dict[str, Any]], tmp_path: Path):
    workdir = tmp_path / "run"
    command = [
        str(ROOT / "tools/launch/ssh.sh"),
        "127.0.0.1,root@127.0.0.1",
        "--",
        "--config",
        str(CONFIG),
        "--workdir",
        str(workdir),
    ]
    long = subprocess.Popen(
        [*command, *flags("steps=100000", "eval.every_steps=0")], env=ssh, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(m["step"] >= 5 for m in lines(workdir)))
    long.send_signal(signal.SIGTERM)
    output, _ = long.communicate(timeout=LIMIT)
    assert long.returncode == 75 and re.search(r"^127\.0\.0\.1: [-\d]+ [:\d]+ step", output, re.MULTILINE), output
    workdir = tmp_path / "other"
    command[-1] = str(workdir)
    found = subprocess.run([*command, *flags("steps=40")], env=ssh, capture_output=True, text=True, timeout=LIMIT)
    assert found.returncode == 0, found.stderr
    check_numbers(workdir, alone)

"""The launch script against stand-ins for Slurm and torchrun: what it starts, what it does next.

The stand-in `srun` runs its command once per node, with that node's SLURM_NODEID, and sends USR1 on
to all; `torchrun` plays a trainer as told by PLAY. Both note their calls.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ["1p3b.sh", "preflight.sh"]

RECORD = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys
name = pathlib.Path(sys.argv[0]).name

def record(**more):
    node = os.environ.get("SLURM_NODEID")
    call = {{"name": name, "arguments": sys.argv[1:], "node": node, **more}}
    descriptor = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(call) + "\\n").encode())  # appended whole: nodes write at once
    os.close(descriptor)
"""

SRUN = (
    RECORD
    + """
record()
command = sys.argv[next(i for i, a in enumerate(sys.argv) if i and not a.startswith("-")):]
if command[1] == "launch/preflight.sh":
    sys.exit(int(os.environ.get("PREFLIGHT", "0")))
nodes = int(next(a for a in sys.argv if a.startswith("--nodes=")).split("=")[1])
children = []
signal.signal(signal.SIGUSR1, lambda *_: [c.send_signal(signal.SIGUSR1) for c in children])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # until every child is in the list
unblock = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
for node in range(nodes):
    environment = os.environ | {"SLURM_NODEID": str(node)}
    children.append(subprocess.Popen(command, env=environment, preexec_fn=unblock))
unblock()
sys.exit(max(child.wait() for child in children))
"""
)

TORCHRUN = (
    RECORD
    + """
usr1_ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
stop = [False]
signal.signal(signal.SIGUSR1, lambda *_: stop.__setitem__(0, True))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
record(usr1_ignored=usr1_ignored, site=os.environ.get("SITE_VARIABLE"))
run = pathlib.Path(next(a for a in sys.argv if a.startswith("run_dir=")).split("=", 1)[1])
play = os.environ.get("PLAY", "")
if "signal" in play:
    with open(os.environ["READY"], "w") as ready:  # a pipe: the test waits at its other end
        ready.write("1")
    signal.sigwait([signal.SIGUSR1])
if "save" in play and os.environ["SLURM_NODEID"] == "0":
    step = int((run / "latest").read_text()[5:]) if (run / "latest").exists() else 0
    (run / "latest").write_text(f"step_{step + 500:08d}")
if "done" in play and os.environ["SLURM_NODEID"] == "0":
    (run / "DONE").touch()
sys.exit(1 if "crash" in play else 0)
"""
)

SCONTROL = (
    RECORD
    + """
record()
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(["gpu007", "gpu012"]))
if sys.argv[1] == "requeue":
    sys.exit(int(os.environ.get("REQUEUE", "0")))
"""
)


@dataclass
class Cluster:
    """A submit directory with the scripts, the stand-ins on PATH, and what they noted."""

    root: Path
    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.root / "runs/1p3b"

    def start(self, *arguments: str, attempt: int = 0, **environment: str) -> subprocess.Popen:
        restart = {"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}  # unset the first time
        process = subprocess.Popen(
            ["bash", str(self.root / "spool_copy"), *arguments],  # Slurm runs a copy, elsewhere
            env=self.environment | restart | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def submit(self, *arguments: str, attempt: int = 0, **environment: str) -> tuple[int, str]:
        """(exit code, output) of one attempt."""
        process = self.start(*arguments, attempt=attempt, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, name: str) -> list[dict]:
        path = Path(self.environment["CALLS"])
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]

    def requeues(self) -> int:
        return sum(call["arguments"] == ["requeue", "4321"] for call in self.calls("scontrol"))


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for name, text in {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}.items():
        write_command(bin_directory / name, text)
    (tmp_path / "launch").mkdir()
    for name in SCRIPTS:
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    shutil.copy(LAUNCH / "1p3b.sh", tmp_path / "spool_copy")
    environment = {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NODELIST": "gpu[007,012]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    cluster = Cluster(tmp_path, environment)
    yield cluster
    for process in cluster.started:
        if process.poll() is None:  # a test that failed: leave none of its processes
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def option(call: dict, name: str) -> str:
    return next(a.split("=", 1)[1] for a in call["arguments"] if a.startswith(f"--{name}="))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def test_slurm_is_asked_for_what_the_script_relies_on():
    text = (LAUNCH / "1p3b.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["signal"] == "B:USR1@600"
    assert "requeue" in asked
    assert asked["ntasks-per-node"] == "1"
    assert asked["open-mode"] == "append"
    assert "/" not in asked["output"]  # a directory that is missing would lose the log
    # Slurm stops reading at the first command.
    assert text.index("\ncd ") > text.rindex("#SBATCH")


def test_fresh_run_to_done(cluster):
    code, output = cluster.submit("train.seed=7", "data.train=a b", PLAY="save done")
    assert code == 0, output
    assert cluster.requeues() == 0
    agents = sorted(cluster.calls("torchrun"), key=lambda call: call["node"])
    assert [call["node"] for call in agents] == ["0", "1"]
    for call in agents:
        assert option(call, "node_rank") == call["node"]
        assert option(call, "nnodes") == "2"
        assert option(call, "nproc_per_node") == "8"
        assert option(call, "master_addr") == "gpu007"
        assert option(call, "max_restarts") == "0"
        assert option(call, "log_dir") == f"runs/1p3b/logs/4321.0/node{call['node']}"
        module = call["arguments"].index("-m")
        assert call["arguments"][module + 1 :] == [
            "pretrain.train",
            "launch/configs/1p3b.yaml",
            "run_dir=runs/1p3b",
            "train.seed=7",
            "data.train=a b",
        ]
    assert option(agents[0], "master_port") == option(agents[1], "master_port") == str(15000 + 4321)
    assert cluster.calls("scontrol")[0]["arguments"] == ["show", "hostnames", "gpu[007,012]"]
    assert (cluster.run / "logs/4321.0").is_dir()


def test_steps_reach_every_node_with_their_cpus(cluster):
    cluster.submit("train.seed=7", PLAY="done")
    preflight, training = cluster.calls("srun")
    for call in (preflight, training):
        assert option(call, "nodes") == option(call, "ntasks") == "2"
        assert option(call, "cpus-per-task") == "64"
        assert option(call, "kill-on-bad-exit") == "1"
    start = preflight["arguments"].index("bash")
    assert preflight["arguments"][start + 1 :] == [
        "launch/preflight.sh",
        "8",
        "launch/configs/1p3b.yaml",
        "run_dir=runs/1p3b",
        "train.seed=7",
    ]


def test_config_and_run_directory_may_be_others(cluster):
    cluster.submit(CONFIG="launch/configs/350m.yaml", PLAY="done")
    cluster.submit("run_dir=elsewhere/x", PLAY="done")
    first, _, second, _ = cluster.calls("torchrun")
    assert {"launch/configs/350m.yaml", "run_dir=runs/350m"} <= set(first["arguments"])
    assert "run_dir=elsewhere/x" in second["arguments"]
    assert (cluster.root / "runs/350m/DONE").exists()
    assert (cluster.root / "elsewhere/x/logs/4321.0").is_dir()


def test_site_env_is_sourced_and_exported(cluster):
    (cluster.root / "launch/site.env").write_text(": $UNSET\nSITE_VARIABLE='two words'\nGPUS_PER_NODE=3\n")
    cluster.submit(PLAY="done")
    for call in cluster.calls("torchrun"):
        assert call["site"] == "two words"
        assert option(call, "nproc_per_node") == "3"


def test_site_example_is_valid_bash():
    subprocess.run(["bash", "-n", LAUNCH / "site.env.example"], check=True)


@pytest.fixture
def workers_ready(cluster):
    """Wait until both nodes' workers can be signalled."""
    path = cluster.root / "ready"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)  # both ends: neither side waits for the other to open it
    cluster.environment["READY"] = str(path)

    def wait() -> None:
        for _ in range(2):
            assert select.select([pipe], [], [], 60)[0], "the workers never started"
            os.read(pipe, 1)

    yield wait
    os.close(pipe)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_the_workers(cluster, workers_ready, sent):
    """USR1 (the time limit): saved and requeued. TERM (scancel): saved, and not ours to requeue."""
    process = cluster.start(PLAY="signal save")
    workers_ready()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    # The script outwaits the signal: it sees the workers' exit code and their checkpoint.
    assert "training ended with 0 at the start -> step_00000500" in output
    assert all(call["usr1_ignored"] for call in cluster.calls("torchrun"))  # the agent survives it
    if sent == signal.SIGUSR1:
        assert (process.returncode, cluster.requeues()) == (0, 1), output
    else:
        assert (process.returncode, cluster.requeues()) == (143, 0), output


def test_done_at_the_time_limit_is_done(cluster, workers_ready):
    process = cluster.start(PLAY="signal save done")
    workers_ready()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeues()) == (0, 0), output


def test_stop_without_the_shells_knowledge_is_requeued(cluster):
    """Steps alone were signalled: workers left with nothing wrong. That is no failed try."""
    code, _ = cluster.submit(PLAY="", MAX_TRIES="1")
    assert (code, cluster.requeues()) == (0, 1)


def test_requeued_attempts_have_their_own_port_and_logs(cluster):
    cluster.submit(PLAY="save")
    cluster.submit(PLAY="done", attempt=1)
    ports = [option(call, "master_port") for call in cluster.calls("torchrun")]
    assert ports[0] == ports[1] != ports[2] == ports[3]
    assert (cluster.run / "logs/4321.1").is_dir()


def test_finished_run_starts_nothing(cluster):
    cluster.run.mkdir(parents=True)
    (cluster.run / "DONE").touch()
    code, output = cluster.submit()
    assert code == 0
    assert "runs/1p3b is done" in output
    assert not cluster.calls("srun") and cluster.requeues() == 0


def test_crashes_without_progress_give_up(cluster):
    codes = [cluster.submit(attempt=n, PLAY="crash")[0] for n in range(2)]
    assert codes == [0, 0]
    assert cluster.requeues() == 2
    code, output = cluster.submit(attempt=2, PLAY="crash")
    assert code == 1
    assert cluster.requeues() == 2
    assert "giving up" in output and "3 tries" in output and "logs/4321.2" in output
    cluster.submit(PLAY="crash")  # submitted anew: counted anew
    assert cluster.requeues() == 3


def test_number_of_tries_is_a_setting(cluster):
    code, _ = cluster.submit(PLAY="crash", MAX_TRIES="1")
    assert (code, cluster.requeues()) == (1, 0)


def test_crash_after_a_new_checkpoint_counts_from_zero(cluster):
    plays = ["crash", "crash", "crash save", "crash", "crash"]
    codes = [cluster.submit(attempt=n, PLAY=play)[0] for n, play in enumerate(plays)]
    assert codes == [0] * 5
    assert cluster.requeues() == 5
    assert cluster.submit(attempt=5, PLAY="crash")[0] == 1


def test_failed_preflight_trains_nothing_and_counts_as_a_try(cluster):
    code, output = cluster.submit(PREFLIGHT="1")
    assert (code, cluster.requeues()) == (0, 1)
    assert "preflight failed (1)" in output
    cluster.submit(PREFLIGHT="1", attempt=1)
    code, _ = cluster.submit(PREFLIGHT="1", attempt=2)
    assert (code, cluster.requeues()) == (1, 2)
    assert not cluster.calls("torchrun")


def test_failing_requeue_is_said(cluster):
    code, output = cluster.submit(PLAY="save", REQUEUE="1")
    assert code == 1
    assert "submit again to continue" in output


def test_missing_srun_is_a_failure(cluster):
    (cluster.root / "bin/srun").unlink()
    code, output = cluster.submit(MAX_TRIES="1")
    assert code == 1
    assert "preflight failed (127)" in output


def test_outside_slurm_says_how_to_start(cluster):
    del cluster.environment["SLURM_SUBMIT_DIR"]
    code, output = cluster.submit()
    assert code != 0
    assert "sbatch launch/1p3b.sh" in output


# preflight.sh


@pytest.fixture
def node(cluster) -> Cluster:
    """A node with 8 GPUs, room on its disks and a Python that is ready."""
    commands = {
        "nvidia-smi": "#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done\n",
        "df": "#!/bin/sh\necho header; echo disk 1 1 ${FREE_KIB:-1073741824} 1% /\n",
        "python": "#!/bin/sh\ncat >/dev/null\n",
    }
    for name, text in commands.items():
        write_command(cluster.root / "bin" / name, text)
    cluster.environment["SLURMD_NODENAME"] = "gpu012"
    return cluster


def preflight(node: Cluster, *arguments: str, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        ["bash", LAUNCH / "preflight.sh", *arguments],
        cwd=cwd or node.root,
        env=node.environment | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_preflight_passes_on_a_good_node(node):
    result = preflight(node, "8", "c.yaml", "run_dir=runs/x")
    assert (result.returncode, result.stderr) == (0, "")
    assert (node.root / "runs/x").is_dir()


def test_preflight_counts_gpus(node):
    result = preflight(node, "9", "c.yaml", "run_dir=runs/x")
    assert result.returncode == 1
    assert "gpu012: 8 GPUs visible, needs 9" in result.stderr
    write_command(node.root / "bin/nvidia-smi", "#!/bin/sh\necho no driver; exit 9\n")
    result = preflight(node, "8", "c.yaml", "run_dir=runs/x")
    assert result.returncode == 1
    assert "0 GPUs visible" in result.stderr


def test_preflight_wants_room_on_disks(node):
    result = preflight(node, "8", "c.yaml", "run_dir=runs/x", FREE_KIB=str(99 * 2**20))
    assert result.returncode == 1
    assert "gpu012: runs/x has 99 GiB free, needs 100" in result.stderr
    result = preflight(node, "8", "c.yaml", "run_dir=runs/x", FREE_KIB="1048576", MIN_FREE_GIB="1")
    assert "/tmp has 1 GiB free, needs 2" in result.stderr
    assert "runs/x has" not in result.stderr


def test_preflight_wants_a_run_directory_that_it_can_make(node):
    (node.root / "file").touch()
    result = preflight(node, "8", "c.yaml", "run_dir=file/x")
    assert result.returncode == 1
    assert "cannot write to file/x" in result.stderr


def test_preflight_imports_and_reads_the_config(node):
    """The real Python, with empty stand-ins for two packages that take long to import."""
    write_command(node.root / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for package in ("deepspeed", "megatron/core"):
        (node.root / "packages" / package).mkdir(parents=True)
        (node.root / "packages" / package / "__init__.py").touch()
    arguments = ("8", "launch/configs/1p3b.yaml", f"run_dir={node.root}/x")
    paths = {"PYTHONPATH": str(node.root / "packages")}
    good = preflight(node, *arguments, "train.seed=7", cwd=LAUNCH.parent, **paths)
    assert good.returncode == 0, good.stderr
    bad = preflight(node, *arguments, "train.sede=7", cwd=LAUNCH.parent, **paths)
    assert bad.returncode == 1
    assert "'train.sede'; did you mean 'train.seed'" in bad.stderr
    (node.root / "packages/deepspeed/__init__.py").write_text("raise ImportError('no deepspeed')")
    broken = preflight(node, *arguments, cwd=LAUNCH.parent, **paths)
    assert broken.returncode == 1
    assert "no deepspeed" in broken.stderr and "is not ready" in broken.stderr

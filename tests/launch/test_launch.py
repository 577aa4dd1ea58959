"""The sbatch scripts against stand-ins for Slurm, torchrun and the preflight: what they start, what they do next.

The stand-in `srun` runs its command once per node, with that node's SLURM_NODEID and SLURMD_NODENAME, and sends USR1 on
to all. `torchrun` plays a trainer as told by PLAY, `python` the preflight. All note their calls.
"""

import ast
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
JOBS = ["1p3b.sh", "350m.sh", "125m.sh"]
BODY = "train_job.sh"

# Python's fastest start: a test starts a dozen of these.
RECORD = f"""#!{sys.executable} -SE
import os, signal, sys, time

def record(**more):
    node = os.environ.get("SLURM_NODEID")
    call = {{"name": os.path.basename(sys.argv[0]), "arguments": sys.argv[1:], "node": node, **more}}
    descriptor = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (repr(call) + "\\n").encode())  # appended whole: nodes write at once
    os.close(descriptor)

def ready():
    with open(os.environ["READY"], "w") as pipe:  # the test waits at its other end
        pipe.write("1")

def wait_for(path):
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            sys.exit(f"{{path}} never came")
        time.sleep(0.01)
"""

SRUN = (
    RECORD
    + """
import subprocess
record()
command = sys.argv[next(i for i, a in enumerate(sys.argv) if i and not a.startswith("-")):]
children = []
signal.signal(signal.SIGUSR1, lambda *_: [c.send_signal(signal.SIGUSR1) for c in children])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # until every child is in the list
unblock = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
for number, node in enumerate(os.environ["NODES"].split()):
    environment = os.environ | {"SLURM_NODEID": str(number), "SLURMD_NODENAME": node}
    children.append(subprocess.Popen(command, env=environment, preexec_fn=unblock))
unblock()
sys.exit(max(child.wait() for child in children))
"""
)

TORCHRUN = (
    RECORD
    + """
usr1_ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
environment = {name: value for name, value in os.environ.items() if name.startswith(("SITE_", "NCCL_", "TORCH_"))}
record(usr1_ignored=usr1_ignored, environment=environment)
if "launch.preflight" in sys.argv:
    if "FABRIC" in os.environ:
        open(sys.argv[sys.argv.index("--report") + 1], "w").write(os.environ["FABRIC"])
    sys.exit("FABRIC" in os.environ)
run = next(a for a in sys.argv if a.startswith("run_dir=")).split("=", 1)[1]
play, first = os.environ.get("PLAY", ""), os.environ["SLURM_NODEID"] == "0"
latest = f"{run}/latest"
if "signal" in play:
    ready()
    signal.sigwait([signal.SIGUSR1])
if "deaf" in play:  # still importing when the signal came: only the file is left of it
    ready()
    wait_for(sys.argv[sys.argv.index("--stop-file") + 1])
if "save" in play and first:
    step = int(open(latest).read()[5:]) if os.path.exists(latest) else 0
    open(latest, "w").write(f"step_{step + 500:08d}")
if "done" in play and first:
    open(f"{run}/DONE", "w")
if "STATUS" in os.environ and first:
    import json
    status = {"reason": os.environ["STATUS"], "step": 7, "detail": 'the "why", at rank 3', "time": time.time()}
    open(f"{run}/status.json", "w").write(json.dumps(status, separators=(",", ":")) + "\\n")
sys.exit(1 if "crash" in play else 0)
"""
)

SCONTROL = (
    RECORD
    + """
record(term_ignored=signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace("gpu[007,012]", os.environ["NODES"]).replace(" ", "\\n").replace(",", "\\n"))
if sys.argv[1:3] == ["show", "node"]:
    print(f"NodeName={sys.argv[4]} Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName={sys.argv[4]}")
if sys.argv[1:3] == ["show", "job"]:
    print("JobId=4321 ReqNodeList=(null) ExcNodeList=%s NumNodes=2" % os.environ.get("AVOIDED", "(null)"))
if sys.argv[1] in ("requeue", "update"):
    sys.exit(int(os.environ.get(sys.argv[1].upper(), "0")))
"""
)

SINFO = (
    RECORD
    + """
record()
print(os.environ["PARTITION_NODES"].replace(" ", "\\n"))
"""
)

PYTHON = (
    RECORD
    + """
record()
if "node" in sys.argv:
    report = sys.argv[sys.argv.index("--report") + 1]
    if "slow" in os.environ.get("PREFLIGHT", ""):
        ready()
        wait_for(os.path.dirname(report) + "/../STOP")
    open(report, "w")
    checks = dict(check.split("=") for check in os.environ.get("CHECKS", "").split())
    sys.exit(int(checks.get(os.environ["SLURMD_NODENAME"], 0)))
fabric = sys.argv[sys.argv.index("report") + 1] + "/fabric.json"
bad = open(fabric).read() if os.path.exists(fabric) else os.environ.get("BAD_NODES", "")
print("the table")
if bad:
    print(f"bad nodes: {bad}")
sys.exit(1 if bad else 0)
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
        return [call for call in map(ast.literal_eval, lines) if call["name"] == name]

    def trainings(self) -> list[dict]:
        return [call for call in self.calls("torchrun") if "pretrain.train" in call["arguments"]]

    def requeues(self) -> int:
        return sum(call["arguments"] == ["requeue", "4321"] for call in self.calls("scontrol"))

    def updates(self) -> list[list[str]]:
        return [call["arguments"][1:] for call in self.calls("scontrol") if call["arguments"][0] == "update"]

    def saved(self, step: int) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "latest").write_text(f"step_{step:08d}")


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    commands = {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL, "sinfo": SINFO, "python": PYTHON}
    for name, text in commands.items():
        write_command(bin_directory / name, text)
    (tmp_path / "launch").mkdir()
    for name in [*JOBS, BODY]:
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    shutil.copy(LAUNCH / "1p3b.sh", tmp_path / "spool_copy")
    environment = {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "NODES": "gpu007 gpu012",
        "PARTITION_NODES": "gpu007 gpu012 gpu013",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NODELIST": "gpu[007,012]",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    cluster = Cluster(tmp_path, environment)
    yield cluster
    for process in cluster.started:
        if process.poll() is None:  # a test that failed: leave none of its processes
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def nodes_ready(cluster) -> Iterator[Callable[[], None]]:
    """Wait until both nodes' processes can be signalled."""
    path = cluster.root / "ready"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)  # both ends: neither side waits for the other to open it
    cluster.environment["READY"] = str(path)

    def wait() -> None:
        for _ in range(2):
            assert select.select([pipe], [], [], 60)[0], "the nodes never started"
            os.read(pipe, 1)

    yield wait
    os.close(pipe)


def option(call: dict, name: str) -> str:
    return next(a.split("=", 1)[1] for a in call["arguments"] if a.startswith(f"--{name}="))


def after(call: dict, word: str) -> list[str]:
    return call["arguments"][call["arguments"].index(word) + 1 :]


# The files


@pytest.mark.parametrize("name", [*JOBS, BODY, "site.env.example"])
def test_scripts_are_valid_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize(("name", "nodes"), [("1p3b.sh", "4"), ("350m.sh", "1"), ("125m.sh", "1")])
def test_slurm_is_asked_for_what_the_body_relies_on(name, nodes):
    text = (LAUNCH / name).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["signal"] == "B:USR1@600"
    assert "requeue" in asked and "exclusive" in asked
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == (nodes, "1", "8")
    assert asked["open-mode"] == "append"
    assert "/" not in asked["output"]  # a directory that is missing would lose the log
    assert asked["job-name"] == Path(name).stem
    # Slurm stops reading at the first command.
    assert text.index("\ncd ") > text.rindex("#SBATCH")


@pytest.mark.parametrize("name", JOBS)
def test_each_script_trains_its_own_config(cluster, name):
    shutil.copy(LAUNCH / name, cluster.root / "spool_copy")
    code, output = cluster.submit(PLAY="done")
    assert code == 0, output
    stem = Path(name).stem
    assert (LAUNCH / f"configs/{stem}.yaml").exists()
    assert after(cluster.trainings()[0], "pretrain.train")[:2] == [
        f"launch/configs/{stem}.yaml",
        f"run_dir=runs/{stem}",
    ]


# What is started


def test_fresh_run_to_done(cluster):
    code, output = cluster.submit("train.seed=7", "data.train=a b", PLAY="save done", STATUS="done")
    assert code == 0, output
    assert cluster.requeues() == 0
    agents = sorted(cluster.trainings(), key=lambda call: call["node"])
    assert [call["node"] for call in agents] == ["0", "1"]
    for call in agents:
        assert option(call, "node_rank") == call["node"]
        assert option(call, "nnodes") == "2"
        assert option(call, "nproc_per_node") == "8"
        assert option(call, "master_addr") == "10.0.0.7"
        assert option(call, "max_restarts") == "0"
        assert option(call, "log_dir") == f"runs/1p3b/logs/4321.0/node{call['node']}"
        assert after(call, "-m") == [
            "pretrain.train",
            "launch/configs/1p3b.yaml",
            "run_dir=runs/1p3b",
            "train.seed=7",
            "data.train=a b",
            "--stop-file",
            "runs/1p3b/logs/4321.0/STOP",
        ]
    assert option(agents[0], "master_port") == option(agents[1], "master_port") == str(15000 + 2 * 4321)
    assert cluster.calls("scontrol")[0]["arguments"] == ["show", "hostnames", "gpu[007,012]"]


def test_each_node_is_checked_alone_and_then_all_together(cluster):
    cluster.submit("train.seed=7", "--allow", "data", PLAY="done")
    checks = [call for call in cluster.calls("python") if "node" in call["arguments"]]
    assert sorted(option_after(call, "--report") for call in checks) == [
        "runs/1p3b/logs/4321.0/preflight/gpu007.json",
        "runs/1p3b/logs/4321.0/preflight/gpu012.json",
    ]
    for call in checks:
        assert option_after(call, "--gpus") == "8"
        assert option_after(call, "--run-dir") == "runs/1p3b"
        assert after(call, "--config") == ["launch/configs/1p3b.yaml", "run_dir=runs/1p3b", "train.seed=7"]
    [table] = [call for call in cluster.calls("python") if "report" in call["arguments"]]
    assert after(table, "report") == ["runs/1p3b/logs/4321.0/preflight", "--expect", "gpu007,gpu012"]
    fabric = [call for call in cluster.calls("torchrun") if "launch.preflight" in call["arguments"]]
    assert [after(call, "launch.preflight") for call in fabric] == [
        ["fabric", "--report", "runs/1p3b/logs/4321.0/preflight/fabric.json"]
    ] * 2
    assert option(fabric[0], "master_port") == str(15000 + 2 * 4321 + 1)


def option_after(call: dict, name: str) -> str:
    return after(call, name)[0]


def test_steps_reach_every_node_with_their_cpus(cluster):
    cluster.submit(PLAY="done")
    alone, fabric, training = cluster.calls("srun")
    for call in (alone, fabric, training):
        assert option(call, "nodes") == option(call, "ntasks") == "2"
        assert option(call, "cpus-per-task") == "64"
    # A bad node must not take the others' checks with it, but must end what it does together with them.
    assert option(alone, "kill-on-bad-exit") == option(alone, "wait") == "0"
    assert option(fabric, "kill-on-bad-exit") == option(training, "kill-on-bad-exit") == "1"


def test_config_and_run_directory_may_be_others(cluster):
    cluster.submit(CONFIG="launch/configs/350m.yaml", PLAY="done")
    cluster.submit("run_dir=elsewhere/x", PLAY="done")
    first, _, second, _ = cluster.trainings()
    assert {"launch/configs/350m.yaml", "run_dir=runs/350m"} <= set(first["arguments"])
    assert "run_dir=elsewhere/x" in second["arguments"]
    assert (cluster.root / "runs/350m/DONE").exists()
    assert (cluster.root / "elsewhere/x/logs/4321.0").is_dir()


def test_site_env_is_sourced_and_exported(cluster):
    (cluster.root / "launch/site.env").write_text(": $UNSET\nSITE_VARIABLE='two words'\nGPUS_PER_NODE=3\n")
    cluster.submit(PLAY="done")
    for call in cluster.trainings():
        assert call["environment"]["SITE_VARIABLE"] == "two words"
        assert option(call, "nproc_per_node") == "3"


def test_nccl_reports_into_the_attempts_logs(cluster):
    cluster.submit(PLAY="done")
    logs = cluster.run / "logs/4321.0"
    environment = cluster.trainings()[0]["environment"]
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["NCCL_DEBUG_FILE"] == f"{logs}/nccl.%h.%p"
    assert int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{logs}/flight_recorder/rank_"
    assert (logs / "flight_recorder").is_dir()  # torch does not make it


# Arguments


def test_options_of_the_trainer_follow_the_overrides(cluster):
    cluster.submit("--allow", "data", "train.seed=7", "--allow=model.vocab_size", PLAY="done")
    arguments = after(cluster.trainings()[0], "pretrain.train")
    assert arguments[1:7] == ["run_dir=runs/1p3b", "train.seed=7", "--allow", "data", "--allow", "model.vocab_size"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--form-step", "5"], "unknown argument --form-step"),
        (["data"], "unknown argument data"),
        (["--allow"], "--allow takes a key"),
        (["--from-step"], "--from-step takes a number"),
    ],
)
def test_wrong_arguments_start_nothing(cluster, arguments, said):
    code, output = cluster.submit(*arguments)
    assert code != 0 and said in output
    assert not cluster.calls("srun") and cluster.requeues() == 0


def test_from_step_goes_back_once(cluster):
    cluster.saved(2000)
    cluster.submit("--from-step", "1000", PLAY="crash")  # nothing written: the next attempt must go back still
    cluster.submit("--from-step=1000", attempt=1, PLAY="crash save")
    cluster.submit("--from-step", "1000", attempt=2, PLAY="crash")
    went_back = [after(call, "pretrain.train")[2:4] == ["--from-step", "1000"] for call in cluster.trainings()]
    assert went_back == [True, True, True, True, False, False]


def test_from_step_goes_back_in_an_arrays_first_task_only(cluster):
    cluster.saved(2000)
    cluster.submit("--from-step", "1000", PLAY="save", SLURM_ARRAY_JOB_ID="4321")
    cluster.submit("--from-step", "1000", PLAY="save", SLURM_ARRAY_JOB_ID="4321", SLURM_JOB_ID="4322")
    cluster.submit("--from-step", "1000", PLAY="save", SLURM_JOB_ID="4400")  # a person's new wish
    went_back = ["--from-step" in call["arguments"] for call in cluster.trainings()]
    assert went_back == [True, True, False, False, True, True]


def test_going_back_without_a_checkpoint_is_no_progress(cluster):
    cluster.saved(2000)
    code, _ = cluster.submit("--from-step", "1000", PLAY="crash", MAX_TRIES="1")
    assert code == 1


# Signals


@pytest.mark.parametrize("play", ["signal save", "deaf save"])
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_the_workers(cluster, nodes_ready, sent, play):
    """USR1 (the time limit): saved and requeued. TERM (scancel): saved, and not ours to requeue."""
    process = cluster.start(PLAY=play, STATUS="signal")
    nodes_ready()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    # The script outwaits the signal: it sees the workers' exit code and their checkpoint.
    assert "training ended with 0 (signal) at the start -> step_00000500" in output
    assert all(call["usr1_ignored"] for call in cluster.trainings())  # the agent survives it
    if sent == signal.SIGUSR1:
        assert (process.returncode, cluster.requeues()) == (0, 1), output
    else:
        assert (process.returncode, cluster.requeues()) == (143, 0), output


@pytest.mark.parametrize(("sent", "code", "requeues"), [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 143, 0)])
def test_signal_during_preflight_trains_nothing(cluster, nodes_ready, sent, code, requeues):
    process = cluster.start(PREFLIGHT="slow", MAX_TRIES="1")
    nodes_ready()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeues()) == (code, requeues), output
    assert not cluster.trainings()
    assert not (cluster.run / "tries_without_progress").exists()


def test_signal_while_the_sites_own_script_runs_is_kept(cluster, nodes_ready):
    """Slurm signals once; loading modules may take a while."""
    (cluster.root / "launch/site.env").write_text('echo 11 >"$READY"; kill -USR1 $$\n')
    process = cluster.start()
    nodes_ready()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeues()) == (0, 1), output
    assert not cluster.calls("srun")


def test_requeue_outlives_the_term_that_it_causes(cluster):
    cluster.submit(PLAY="crash")
    [call] = [call for call in cluster.calls("scontrol") if call["arguments"][0] == "requeue"]
    assert call["term_ignored"]


# What is next


def test_done_at_the_time_limit_is_done(cluster, nodes_ready):
    process = cluster.start(PLAY="signal save done", STATUS="done")
    nodes_ready()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeues()) == (0, 0), output


def test_stop_without_the_shells_knowledge_is_requeued(cluster):
    """Steps alone were signalled: the trainer says so. That is no failed try."""
    code, _ = cluster.submit(STATUS="signal", MAX_TRIES="1")
    assert (code, cluster.requeues()) == (0, 1)


def test_finished_run_starts_nothing(cluster):
    cluster.run.mkdir(parents=True)
    (cluster.run / "DONE").touch()
    code, output = cluster.submit()
    assert code == 0
    assert "runs/1p3b is done" in output
    assert not cluster.calls("srun") and cluster.requeues() == 0


def test_stop_file_ends_the_job_until_it_is_removed(cluster):
    code, output = cluster.submit(PLAY="save", STATUS="stop_file")
    assert (code, cluster.requeues()) == (0, 0)
    assert "stopped by runs/1p3b/STOP at step_00000500; to go on: remove it and submit again" in output
    (cluster.run / "STOP").touch()
    started = len(cluster.calls("srun"))
    code, output = cluster.submit()
    assert (code, cluster.requeues(), len(cluster.calls("srun"))) == (0, 0, started)
    assert "remove it and submit again" in output
    (cluster.run / "STOP").unlink()
    assert cluster.submit(PLAY="done")[0] == 0
    assert (cluster.run / "DONE").exists()


@pytest.mark.parametrize("reason", ["bad_input", "not_finite"])
def test_what_a_requeue_does_not_mend_ends_the_job(cluster, reason):
    code, output = cluster.submit(PLAY="save crash", STATUS=reason)
    assert (code, cluster.requeues()) == (1, 0)
    assert f'giving up: {reason}: the \\"why\\", at rank 3' in output


@pytest.mark.parametrize("reason", ["running", "checkpoint", "hang", "error"])
def test_other_failures_are_tried_again(cluster, reason):
    code, output = cluster.submit(PLAY="crash", STATUS=reason)
    assert (code, cluster.requeues()) == (0, 1)
    assert f"training failed (1, {reason}: the" in output


@pytest.mark.parametrize("torn", ["", '{"reason":"bad_in', "\x00\x00", '{"reason":"bad_input","detail":""}'])
def test_status_of_an_earlier_attempt_or_a_torn_one_decides_nothing(cluster, torn):
    cluster.run.mkdir(parents=True)
    (cluster.run / "status.json").write_text(torn)
    code, output = cluster.submit(PLAY="crash")
    assert (code, cluster.requeues()) == (0, 1), output
    assert "training ended with 1 (no status)" in output


def test_requeued_attempts_have_their_own_port_and_logs(cluster):
    cluster.submit(PLAY="save", STATUS="signal")
    cluster.submit(PLAY="done", attempt=1)
    ports = [option(call, "master_port") for call in cluster.calls("torchrun")]
    assert len(set(ports)) == 4  # of two attempts' fabric checks and trainings
    assert (cluster.run / "logs/4321.1").is_dir()


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


def test_tries_are_counted_across_the_jobs_of_a_chain(cluster):
    cluster.submit(PLAY="crash", MAX_TRIES="2", SLURM_JOB_ID="4320")
    assert cluster.submit(PLAY="crash", MAX_TRIES="2")[0] == 1


def test_crash_after_a_new_checkpoint_counts_from_zero(cluster):
    plays = ["crash", "crash", "crash save", "crash", "crash"]
    codes = [cluster.submit(attempt=n, PLAY=play)[0] for n, play in enumerate(plays)]
    assert codes == [0] * 5
    assert cluster.requeues() == 5
    assert cluster.submit(attempt=5, PLAY="crash")[0] == 1


def test_failing_requeue_is_said(cluster):
    code, output = cluster.submit(PLAY="save", STATUS="signal", REQUEUE="1")
    assert code == 1
    assert "submit again to continue" in output


# Bad nodes


def test_bad_node_is_excluded_while_the_job_is_pending_and_noted(cluster):
    code, output = cluster.submit(CHECKS="gpu012=1", BAD_NODES="gpu012", AVOIDED="gpu099")
    assert (code, cluster.requeues()) == (0, 1), output
    assert not cluster.calls("torchrun")
    assert cluster.updates() == [["JobId=4321", "ExcNodeList=gpu099,gpu012"]]
    commands = [call["arguments"][0] for call in cluster.calls("scontrol")]
    assert commands.index("requeue") < commands.index("update")  # refused while the job runs
    [line] = (cluster.run / "excluded_nodes").read_text().splitlines()
    assert re.fullmatch(
        r"gpu012  \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d  job 4321\.0  runs/1p3b/logs/4321\.0/preflight/gpu012\.json", line
    )
    assert "the table" in output and "bad nodes: gpu012" in output


def test_node_that_never_answered_is_excluded_too(cluster):
    cluster.submit(NODES="gpu007", SLURM_JOB_NODELIST="gpu007,gpu012", BAD_NODES="gpu012")
    assert cluster.updates() == [["JobId=4321", "ExcNodeList=gpu012"]]
    assert "no report from it in runs/1p3b/logs/4321.0/preflight" in (cluster.run / "excluded_nodes").read_text()


def test_bad_nodes_count_as_tries(cluster):
    for attempt in range(2):
        cluster.submit(BAD_NODES="gpu012", attempt=attempt)
    code, output = cluster.submit(BAD_NODES="gpu012", attempt=2)
    assert (code, cluster.requeues()) == (1, 2)
    assert "giving up: preflight failed" in output


def test_nodes_that_are_all_bad_are_not_excluded(cluster):
    code, output = cluster.submit(CHECKS="gpu007=1 gpu012=1", BAD_NODES="gpu007,gpu012")
    assert (code, cluster.requeues(), cluster.updates()) == (0, 1, [])
    assert "every node is bad" in output
    assert not (cluster.run / "excluded_nodes").exists()


def test_node_that_the_partition_cannot_spare_is_not_excluded(cluster):
    """The job would wait for ever."""
    code, output = cluster.submit(BAD_NODES="gpu012", AVOIDED="gpu013")
    assert (code, cluster.requeues(), cluster.updates()) == (0, 1, [])
    assert "not excluding gpu012: the partition has too few others" in output


def test_refused_exclusion_is_said(cluster):
    code, output = cluster.submit(BAD_NODES="gpu012", UPDATE="1")
    assert (code, cluster.requeues()) == (0, 1)
    assert "could not exclude gpu012" in output
    assert not (cluster.run / "excluded_nodes").exists()


def test_check_that_fails_without_naming_a_node_trains_nothing(cluster):
    code, output = cluster.submit(CHECKS="gpu007=124", MAX_TRIES="1")
    assert code == 1
    assert "giving up: preflight failed (124)" in output
    assert not cluster.calls("torchrun")


def test_node_that_the_check_of_all_together_names_is_excluded(cluster):
    code, output = cluster.submit(FABRIC="gpu007")
    assert (code, cluster.requeues()) == (0, 1)
    assert cluster.updates() == [["JobId=4321", "ExcNodeList=gpu007"]]
    assert "preflight of all nodes together failed (1): bad nodes: gpu007" in output
    assert not cluster.trainings()


def test_failed_check_of_all_nodes_together_that_names_none_is_tried_again(cluster):
    code, output = cluster.submit(FABRIC="")
    assert (code, cluster.requeues(), cluster.updates()) == (0, 1, [])
    assert "preflight of all nodes together failed (1)" in output
    assert not cluster.trainings()


def test_a_jobs_only_node_is_excluded(cluster):
    """Slurm would likely give it again."""
    cluster.submit(NODES="gpu012", SLURM_JOB_NODELIST="gpu012", BAD_NODES="gpu012")
    assert cluster.updates() == [["JobId=4321", "ExcNodeList=gpu012"]]


def test_tries_that_cannot_be_counted_are_not_made(cluster):
    """As on a full disk; here a directory is in the way."""
    (cluster.run / "tries_without_progress.new").mkdir(parents=True)
    code, output = cluster.submit(PLAY="crash")
    assert (code, cluster.requeues()) == (1, 0)
    assert "giving up: training failed (1), and cannot count that" in output


def test_wrong_config_is_not_tried_again(cluster):
    code, output = cluster.submit(CHECKS="gpu007=2 gpu012=2")
    assert (code, cluster.requeues()) == (1, 0)
    assert "config" in output and "giving up" in output


def test_step_that_cannot_start_is_a_failure(cluster):
    write_command(cluster.root / "bin/srun", "#!/bin/sh\nexit 127\n")
    code, output = cluster.submit(MAX_TRIES="1")
    assert code == 1
    assert "giving up: preflight failed (127)" in output


def test_outside_slurm_says_how_to_start(cluster):
    del cluster.environment["SLURM_SUBMIT_DIR"]
    code, output = cluster.submit()
    assert code != 0
    assert "sbatch launch/1p3b.sh" in output

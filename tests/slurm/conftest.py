"""A real Slurm on one machine, and this repository as a user of it has it.

Each node is a network, process, mount and host name namespace with 96 pretended CPUs and 8 pretended GPUs; the
controller is one too. They share the machine's disk, as a cluster shares its file system.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PREFIX = "lhtest"  # of everything that outlives a killed process: namespaces, network cards, mounts
SUBNET = "10.231.42"
NODES = 3
SMALL_DISK_MIB = 48
PROGRAMS = ("ip", "unshare", "setpriv", "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun", "git")
# A killed test process takes them with it.
DIE_WITH_ME = ("setpriv", "--pdeathsig", "KILL")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

SLURM_CONF = """
ClusterName={prefix}
SlurmctldHost=ctl({subnet}.1)
SlurmctldPort=17642
SlurmdPort=17643
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SlurmdSpoolDir={root}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
MessageTimeout=10
MinJobAge=3600
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr={subnet}.[11-{last}] CPUs=96 RealMemory=1000000 Gres=gpu:8
PartitionName=gpu Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE
"""

# What site.env.example is for: this cluster's Python, and that it has no GPUs.
SITE_ENV = """
PATH={python}:$PATH
GPUS_PER_NODE=1
PREFLIGHT_CPU=1
CUDA_VISIBLE_DEVICES=
OMP_NUM_THREADS=1
OMP_WAIT_POLICY=PASSIVE
"""

STEPS, BATCH, SEQLEN = 200, 8, 64
CONFIG = f"""
model: {{vocab_size: 512, d_model: 64, n_layer: 2}}
data: {{train: SHARD, valid: SHARD, seqlen: {SEQLEN}}}
train: {{total_tokens: {STEPS * BATCH * SEQLEN}, global_batch_size: {BATCH}, micro_batch_size: 2, precision: fp32}}
checkpoint: {{interval: 50, keep_last: 2}}
eval: {{interval: 100, tokens: 2000}}
log: {{wandb: disabled, interval: 50}}
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of what happened, its seconds with setting up and tidying."""
    everything = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [r for r in everything if isinstance(r, pytest.TestReport) and r.nodeid.startswith("tests/slurm/")]
    ended = [report for report in reports if report.when == "call" and not report.skipped]
    if ended:
        terminalreporter.section("jobs on a real Slurm: every result is the undisturbed run's, to the last bit")
    for report in ended:
        seconds = sum(other.duration for other in reports if other.nodeid == report.nodeid)
        name = report.nodeid.rpartition("::test_")[2].replace("_", " ")
        happened = dict(report.user_properties).get("happened", report.outcome)
        terminalreporter.write_line(f"{name:28}{seconds:6.0f} s  {happened}")


def output_of(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """The output of a command. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def why_no_cluster() -> str | None:
    """What this machine lacks for a cluster of namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces and slurmctld need root"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"not installed: {', '.join(missing)} (`make slurm-test` installs Debian's packages)"
    probe = ("unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "type", "bridge")
    try:
        output_of(*probe)
    except RuntimeError as error:
        return f"namespaces or bridges are not allowed here: {error}"
    return None


# ---- machines ---------------------------------------------------------------------------------------------------


class Machine:
    """A computer of its own to whatever runs in it: network, processes, host name, /dev/shm, /etc/hosts."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.namespace = f"{PREFIX}-{name}"
        self.hosts = Path("/etc/netns") / self.namespace / "hosts"
        self._power: subprocess.Popen[bytes] | None = None

    def install(self, hosts: str) -> None:
        """Connect it to the bridge, and let it know the others' names."""
        self.hosts.parent.mkdir(parents=True)
        self.hosts.write_text(hosts)
        self.hosts.with_name("resolv.conf").touch()  # no name server to wait for
        inside = ("ip", "-n", self.namespace)
        output_of("ip", "netns", "add", self.namespace)
        output_of("ip", "link", "add", self.namespace, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        output_of("ip", "link", "set", self.namespace, "master", f"{PREFIX}-br", "up")
        output_of(*inside, "link", "set", "lo", "up")
        output_of(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")

    def power_on(self, log: Path, *command: str | Path) -> None:
        """Start its init process, which runs `command` and ends with it."""
        output_of("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        isolated = ("unshare", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        boot = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && { "$@" & wait $!; }'
        with log.open("ab") as output:
            self._power = subprocess.Popen(
                [*DIE_WITH_ME, "ip", "netns", "exec", self.namespace, *isolated, "bash", "-c", boot, self.name]
                + [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Control-C is for the tests alone
            )

    def power_off(self) -> None:
        """End all its processes at once; the network is first, so that nobody hears of it."""
        output_of("ip", "-n", self.namespace, "link", "set", "eth0", "down")
        kill_all_in(self.namespace)
        if self._power is not None:
            self._power.kill()
            self._power.wait()

    def running(self, command: bytes, environment: bytes) -> list[int]:
        """Ids, as this machine knows them, of that one's processes with these words in command and environment."""
        found = []
        for pid in processes_in(self.namespace):
            try:
                its_command, its_environment = (Path(f"/proc/{pid}/{n}").read_bytes() for n in ("cmdline", "environ"))
            except OSError:
                continue  # gone since
            if command in its_command and environment in its_environment:
                found.append(pid)
        return found

    def workers(self) -> list[int]:
        """The training processes."""
        return self.running(b"pretrain.train", b"LOCAL_RANK=")


def processes_in(namespace: str) -> list[int]:
    return [int(pid) for pid in output_of("ip", "netns", "pids", namespace).split()]


def kill_all_in(namespace: str) -> None:
    deadline = time.monotonic() + 30
    while pids := processes_in(namespace):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{namespace}: processes {pids} outlive SIGKILL")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def remove_machines() -> None:
    """Take down every machine, card and mount of ours, also an earlier run's that was killed."""
    for line in output_of("ip", "netns", "list").splitlines():
        namespace = line.split()[0]
        if namespace.startswith(f"{PREFIX}-"):
            kill_all_in(namespace)
            output_of("ip", "netns", "delete", namespace)
    for folder in Path("/etc/netns").glob(f"{PREFIX}-*"):
        shutil.rmtree(folder)
    for card in Path("/sys/class/net").glob(f"{PREFIX}-*"):
        if card.exists():  # a pair leaves together
            subprocess.run(["ip", "link", "delete", card.name], capture_output=True)
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        source, place, *_ = mount.split()
        if source == f"{PREFIX}-disk":
            output_of("umount", "--lazy", place)


# ---- Slurm ------------------------------------------------------------------------------------------------------


class SlurmCluster:
    """munged, slurmctld and a slurmd per node, all files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.controller = Machine("ctl", f"{SUBNET}.1")
        self.nodes = {f"node{i}": Machine(f"node{i}", f"{SUBNET}.{10 + i}") for i in range(1, NODES + 1)}
        self.small_disk = root / "small_disk"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(root / "slurm.conf"),
        }
        self._munge: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when every node is idle."""
        remove_machines()
        self._write_files()
        self._start_munge()
        output_of("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", f"{PREFIX}-disk", self.small_disk)
        bridge = f"{PREFIX}-br"
        output_of("ip", "link", "add", bridge, "type", "bridge")
        output_of("ip", "address", "add", f"{SUBNET}.254/24", "dev", bridge)  # for the commands of this process
        output_of("ip", "link", "set", bridge, "up")
        for machine in (self.controller, *self.nodes.values()):
            machine.install(self.hosts())
        self.controller.power_on(self.root / "slurmctld.out", "slurmctld", "-D", "-f", self.root / "slurm.conf")
        for name in self.nodes:
            self.power_on(name)

    def stop(self) -> None:
        remove_machines()
        if self._munge is not None:
            self._munge.kill()
            self._munge.wait()

    def hosts(self) -> str:
        machines = (self.controller, *self.nodes.values())
        return "127.0.0.1 localhost\n" + "".join(f"{m.address} {m.name}\n" for m in machines)

    def power_on(self, name: str) -> None:
        """Returns when Slurm may use the node."""
        configuration = self.root / "slurm.conf"
        self.nodes[name].power_on(self.root / f"{name}.out", "slurmd", "-D", "-N", name, "-f", configuration)
        self.wait_until(lambda: self.node_state(name) == "idle", f"{name} is idle", seconds=60)

    @contextmanager
    def without_power(self, name: str) -> Iterator[None]:
        """A node that is dead at once, and mended in the end."""
        self.nodes[name].power_off()
        try:
            yield
        finally:
            self.power_on(name)

    @contextmanager
    def nameless(self, name: str) -> Iterator[None]:
        """A node that has lost the others' names, as with a broken name server."""
        hosts = self.nodes[name].hosts  # written in place: the node has this very file mounted
        hosts.write_text(f"127.0.0.1 localhost\n{self.nodes[name].address} {name}\n")
        try:
            yield
        finally:
            hosts.write_text(self.hosts())

    def running(self, command: bytes, environment: bytes) -> list[int]:
        return [pid for node in self.nodes.values() for pid in node.running(command, environment)]

    @contextmanager
    def frozen(self, command: bytes, environment: bytes) -> Iterator[None]:
        """All such processes stand still, as on a file system that hangs."""
        processes = self.running(command, environment)
        assert processes, f"no process of {command!r}"
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)

    def node_state(self, name: str) -> str:
        try:
            return self.slurm("sinfo", "--noheader", f"--nodes={name}", "--format=%T").strip()
        except RuntimeError as error:
            return str(error)  # the controller is not up yet

    def slurm(self, *command: str) -> str:
        return output_of(*command, environment=self.environment)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Poll. Raises TimeoutError with the state of the cluster."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                state = self.slurm("squeue", "--all") + self.slurm("sinfo", "--Node", "--long")
                raise TimeoutError(f"not after {seconds:.0f} s: {what}\n{state}")
            time.sleep(0.05)

    def _write_files(self) -> None:
        (self.root / "state").mkdir()
        self.small_disk.mkdir()
        text = SLURM_CONF.format(prefix=PREFIX, subnet=SUBNET, root=self.root, nodes=NODES, last=10 + NODES)
        (self.root / "slurm.conf").write_text(text)
        for i in range(8):
            os.mknod(self.root / f"gpu{i}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not looked for: a node's /sys is its own
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-7]\n")

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        with (self.root / "munge.log").open("wb") as log:
            self._munge = subprocess.Popen(
                [*DIE_WITH_ME, "munged", "--foreground", "--force", *options], stdin=subprocess.DEVNULL, stderr=log
            )
        self.wait_until((self.root / "munge.socket").exists, "munged listens", seconds=30)


@dataclass(frozen=True)
class Job:
    """A job by its number, or a task of an array as "JOB_TASK"."""

    cluster: SlurmCluster
    id: str

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says, by its names: JobState, Restarts, ExitCode, …"""
        words = self.cluster.slurm("scontrol", "--oneliner", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def tasks(self, *numbers: int) -> list["Job"]:
        """An array's jobs."""
        return [Job(self.cluster, f"{self.id}_{n}") for n in numbers]

    def text(self) -> str:
        """What its script has printed."""
        log = Path(self.facts()["StdOut"])
        return log.read_text() if log.exists() else ""

    def cancel(self) -> None:
        self.cluster.slurm("scancel", self.id)

    def reach_time_limit(
        self, minutes: int = 10, command: bytes = b"pretrain.train", environment: bytes = b"LOCAL_RANK="
    ) -> None:
        """USR1 by the script's own --signal=B:USR1@600, as Slurm looks at limits: every half minute.

        The training, or such processes, stand still meanwhile. (`scancel --signal` signals an array's task, but says
        it was refused.)
        """
        with self.cluster.frozen(command, environment):
            self.cluster.slurm("scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}")
            self.wait_for(lambda: "USR1" in self.text(), "the signal")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll for something that comes before the job ends; a requeued job need not wait out its delay."""

        def met() -> bool:
            if condition():
                return True
            facts = self.facts()
            assert facts["JobState"] not in ENDED or condition(), f"ended as {facts['JobState']} before {what}"
            self._start_now(facts)
            return False

        try:
            self.cluster.wait_until(met, what)
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"job {self.id}: {error}\n{self.text()[-8000:]}") from error

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        """Until it has ended, through any requeues, as `state`."""
        self.wait_for(lambda: self.state == state, state)

    def _start_now(self, facts: dict[str, str]) -> None:
        """Slurm lets a requeued job wait two minutes. Two seconds it needs: it tells its starts apart by the second."""
        soon = time.strftime("%FT%T", time.localtime(time.time() + 3))
        if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime" and facts["EligibleTime"] > soon:
            self.cluster.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")


# ---- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run's directory."""

    path: Path

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step, in the file's order; JSON keeps every bit of a float."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(values["step"], values["loss"]) for values in whole if "loss" in values]

    def step(self) -> int:
        losses = self.losses()
        return losses[-1][0] if losses else 0

    def saved_step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        latest = self.path / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0

    def status(self) -> dict[str, object]:
        return json.loads((self.path / "status.json").read_text())

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()


@dataclass(frozen=True)
class Site:
    """A clone of the repository on the cluster's disk, from which jobs are submitted."""

    cluster: SlurmCluster
    root: Path

    def run(self, name: str) -> Run:
        return Run(self.root / "runs" / name)

    def submit(self, run: Run, *options: str, script: str = "launch/1p3b.sh", **environment: str) -> Job:
        """`sbatch` a launch script as it is, on two nodes; `environment` is the submitting user's."""
        options = ("--nodes=2", f"--job-name={run.path.name}", *options)
        run_dir = f"run_dir={run.path.relative_to(self.root)}"
        return self.sbatch(*options, script, run_dir, **{"CONFIG": "config.yaml"} | environment)

    def sbatch(self, *arguments: str, **environment: str) -> Job:
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=self.root,
            env=self.cluster.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return self.job(done.stdout.strip())

    def job(self, number: str) -> Job:
        return Job(self.cluster, number)


def clone_working_tree(destination: Path) -> None:
    """The repository's last commit, with what the working tree has on top."""
    git = ("git", "-c", "safe.directory=*", "-C", REPOSITORY)  # it may be a user's, and this is root
    output_of(*git, "clone", "--quiet", "--shared", REPOSITORY, destination)
    for name in output_of(*git, "ls-files", "--deleted", "-z").split("\0"):
        if name:
            (destination / name).unlink(missing_ok=True)
    for name in output_of(*git, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        source, copy = REPOSITORY / name, destination / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


@pytest.fixture(scope="session")
def only_one() -> Iterator[None]:
    """Names and addresses are the same in every process that runs these tests."""
    with Path(f"/run/{PREFIX}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.fail("another process on this machine is running these tests")
        yield


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_no_cluster():
        pytest.skip(f"no Slurm here: {reason}")
    request.getfixturevalue("only_one")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def site(cluster: SlurmCluster, shard, tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site") / "repository"
    clone_working_tree(root)
    (root / "launch/site.env").write_text(SITE_ENV.format(python=Path(sys.executable).parent))
    (root / "config.yaml").write_text(CONFIG.replace("SHARD", shard.prefix))
    return Site(cluster, root)


@dataclass(frozen=True)
class Finished:
    """A run that ended, and its job."""

    run: Run
    job: Job


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> Finished:
    """What every disturbed run must equal."""
    run = site.run("undisturbed")
    job = site.submit(run)
    job.wait_for_end()
    return Finished(run, job)


@pytest.fixture
def run_to_disturb(request: pytest.FixtureRequest, site: Site, undisturbed: Finished) -> Iterator[Run]:
    """A run of the test's own name; where the test fails, its jobs don't stay in the way of the next."""
    run = site.run(request.node.name.removeprefix("test_")[:60])
    yield run
    site.cluster.slurm("scancel", "--full", "--user=root")
    nodes = site.cluster.nodes
    site.cluster.wait_until(lambda: all(site.cluster.node_state(n) == "idle" for n in nodes), "all nodes are idle")

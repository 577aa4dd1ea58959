"""Jobs that faults are put into, what they are compared with, and the table of how they fared."""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Column, Table
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, INTERVAL, BATCH, SEQLEN = 24, 6, 4, 16
LIMIT = 120  # seconds for one start of a job; it takes two on an idle machine
CONFIG = f"""
model: {{vocab_size: 512, d_model: 32, n_layer: 1}}
data: {{seqlen: {SEQLEN}}}
optim: {{lr: 3.0e-3, min_lr: 3.0e-4, warmup_fraction: 0.2}}
train: {{total_tokens: {STEPS * BATCH * SEQLEN}, global_batch_size: {BATCH}, micro_batch_size: 2, precision: fp32}}
checkpoint: {{interval: {INTERVAL}, keep_last: 3}}
eval: {{interval: 8, tokens: 320}}
log: {{wandb: disabled, interval: 100}}
"""
TABLES = pytest.StashKey[dict[str, "Table"]]()
RECOVERIES = pytest.StashKey[list["Recovered"]]()

Fault = dict[str, Any]  # the fields of faults.Fault


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", help="write the tables of recoveries to this file, too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES], config.stash[RECOVERIES] = {}, []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tables, recoveries = list(config.stash[TABLES].values()), config.stash[RECOVERIES]
    if recoveries:
        tables = [summary(recoveries), details(recoveries), *tables]
    console = Console(width=max(120, terminalreporter._tw.fullwidth))
    for table in tables:
        console.print(table)
    if path := config.getoption("--fault-report", default=None):
        Path(path).write_text("\n".join(markdown(table) for table in tables))


@dataclass(frozen=True)
class Recovered:
    """A fault that a run survived. `detected_in`: seconds from it to the last rank's end; None: no rank ended."""

    kind: str
    fault: str
    detected_in: float | None
    resumed_at: int
    lost_steps: int
    loss_difference: float


def details(recoveries: Sequence[Recovered]) -> Table:
    title = f"Recoveries: {STEPS} steps of {BATCH * SEQLEN} tokens, a checkpoint every {INTERVAL}"
    columns = ("detected in, s", "resumed at step", "steps lost", "tokens lost", "final loss difference")
    table = Table(Column("fault", overflow="fold"), *(Column(c, max_width=14) for c in columns), title=title)
    for r in recoveries:
        detected = "at once" if r.detected_in is None else f"{r.detected_in:.2f}"
        tokens = r.lost_steps * BATCH * SEQLEN
        table.add_row(r.fault, detected, str(r.resumed_at), str(r.lost_steps), str(tokens), f"{r.loss_difference:.2g}")
    return table


def summary(recoveries: Sequence[Recovered]) -> Table:
    """The worst of each kind."""
    columns = ("times", "detected in at most, s", "steps lost at most", "final loss difference at most")
    table = Table("faults", *(Column(c, max_width=14) for c in columns), title="Recoveries by kind")
    for kind in dict.fromkeys(r.kind for r in recoveries):
        rows = [r for r in recoveries if r.kind == kind]
        seconds = max((r.detected_in for r in rows if r.detected_in is not None), default=None)
        worst = max(abs(r.loss_difference) for r in rows)
        detected = "at once" if seconds is None else f"{seconds:.1f}"
        table.add_row(kind, str(len(rows)), detected, str(max(r.lost_steps for r in rows)), f"{worst:.2g}")
    return table


def markdown(table: Table) -> str:
    """A table as Markdown's."""
    rows = [[str(c.header) for c in table.columns], ["---"] * len(table.columns)]
    rows += [list(row) for row in zip(*(map(str, c.cells) for c in table.columns), strict=True)]
    return f"**{table.title}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Callable[..., Table]:
    """A table by title, printed at the end of the session; the first caller names its columns."""

    def get(title: str, *columns: str) -> Table:
        tables = pytestconfig.stash[TABLES]
        return tables.setdefault(title, Table(*columns, title=title))

    return get


class Launcher:
    """The process that forks jobs (launcher.py)."""

    def __init__(self, log: Path) -> None:
        self.log = log
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        assert self._answer(120) == "ready\n", log.read_text()

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self._answer(3 * job["limit"]))

    def _answer(self, seconds: float) -> str:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert ready, f"no answer in {seconds} s: {self.log.read_text()}"
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()  # its ranks, if there are any, end with it
        self.process.wait()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher") / "stderr")
    yield launcher
    launcher.close()


@dataclass(frozen=True)
class Start:
    """One start of a job, and how it ended."""

    codes: list[int]
    started: float
    ended: float
    log: str
    acted: list[dict[str, Any]]

    @property
    def detected_in(self) -> float | None:
        """Seconds from the first fault to the end of the last rank; None where none was put in."""
        return self.ended - self.acted[0]["time"] if self.acted else None

    @property
    def resumed_at(self) -> int:
        found = re.search(r"resumed from \S*step_(\d+)", self.log)
        return int(found[1]) if found else 0


@dataclass
class Job:
    """A training command that is started again and again."""

    launcher: Launcher
    folder: Path
    world: int
    arguments: list[str]
    starts: list[Start] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, *faults: Fault, extra: Sequence[str] = (), grace: float = 20) -> Start:
        """Until its ranks have ended: by themselves, or as torchrun ends them where one has failed.

        `extra` arguments are this start's alone; `grace`: seconds from TERM to KILL where a rank has failed.
        """
        log = self.folder / f"log{len(self.starts)}"
        job = {"world": self.world, "arguments": [*self.arguments, *extra], "faults": faults, "grace": grace}
        answer = self.launcher.run(job | {"limit": LIMIT, "log": str(log), "faults_log": f"{log}.faults"})
        text = "".join(f"--- rank {r}\n" + log.with_name(f"{log.name}.{r}").read_text() for r in range(self.world))
        faults_log = log.with_name(f"{log.name}.faults")
        acted = [json.loads(line) for line in faults_log.read_text().splitlines()] if faults_log.exists() else []
        assert not answer["timed_out"], text
        return self.record(answer["codes"], answer["started"], answer["ended"], text, acted)

    def record(self, codes: list[int], started: float, ended: float, log: str, acted: list[dict[str, Any]]) -> Start:
        self.starts.append(Start(codes, started, ended, log, acted))
        return self.starts[-1]

    def records(self, key: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that have `key`, whole ones."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [values for line in lines if line.endswith(b"\n") and key in (values := json.loads(line))]

    @property
    def last_step(self) -> int:
        return max((r["step"] for r in self.records("loss")), default=0)

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step_")) for p in (self.run_dir / "checkpoints").glob("step_*"))

    def manifest(self) -> dict[str, Any]:
        """Of the newest checkpoint."""
        return json.loads(
            (self.run_dir / "checkpoints" / f"step_{self.checkpoints()[-1]:08d}/manifest.json").read_text()
        )

    def curve(self) -> dict[str, dict[int, list[float]]]:
        """What a run's numbers are: every step's, and the validation's, each written once."""
        columns = {"loss": ("consumed_tokens", "loss", "grad_norm", "lr"), "validation_loss": ("validation_loss",)}
        found = {}
        for key, names in columns.items():
            records = self.records(key)
            found[key] = {r["step"]: [r[name] for name in names] for r in records}
            assert len(found[key]) == len(records), f"a step is there twice: {records}"
        return found

    def final_state(self) -> dict[str, Tensor]:
        """Parameters, moments and torch's generator of every rank in the newest checkpoint.

        (Training draws nothing from Python's and NumPy's generators, which no run seeds.)
        """
        folder = self.run_dir / "checkpoints" / f"step_{self.checkpoints()[-1]:08d}"
        files = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        tensors = {f"{rank}|{name}": t for rank, file in files.items() for name, t in file.items()}
        return {name: t for name, t in tensors.items() if "|rng|" not in name or name.endswith("|rng|torch")}


@pytest.fixture(scope="session")
def new_job(launcher: Launcher, shard, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:  # type: ignore[no-untyped-def]
    """A job of the tiny model: its number of ranks, and overrides of its config."""

    def new(world: int, *overrides: str) -> Job:
        folder = tmp_path_factory.mktemp("job")
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        data = (f"data.train={shard.prefix}", f"data.valid={shard.prefix}", f"run_dir={folder / 'run'}")
        return Job(launcher, folder, world, [str(config), *data, *overrides])

    return new


@pytest.fixture(scope="session")
def undisturbed(new_job: Callable[..., Job]) -> Callable[..., Job]:
    """The same job, done without a fault; each is run once."""
    done: dict[tuple[Any, ...], Job] = {}

    def get(world: int, *overrides: str) -> Job:
        key = (world, *overrides)
        if key not in done:
            job = new_job(world, *overrides)
            start = job.start()
            assert set(start.codes) == {0} and job.done, start.log
            losses = [record["loss"] for record in job.records("loss")]
            assert losses[-1] < losses[0] - 0.3  # it learns, so that there are wrong losses
            done[key] = job
        return done[key]

    return get


def difference(got: dict[str, dict[int, list[float]]], want: dict[str, dict[int, list[float]]]) -> str:
    """The first steps at which two curves differ, or nothing."""
    lines = []
    for key in want:
        steps = [s for s in sorted(want[key].keys() | got[key].keys()) if want[key].get(s) != got[key].get(s)]
        lines += [f"{key} at step {s}: {got[key].get(s)} instead of {want[key].get(s)}" for s in steps[:2]]
    return "\n".join(lines)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


class Recovery:
    """Brings disturbed jobs to their ends, and holds them to what was promised."""

    def __init__(self, undisturbed: Callable[..., Job], kind: str, recoveries: list[Recovered]) -> None:
        self.undisturbed, self.kind, self.recoveries = undisturbed, kind, recoveries

    def add(self, fault: str, detected_in: float | None, resumed_at: int, lost_steps: int, difference: float) -> None:
        self.recoveries.append(Recovered(self.kind, fault, detected_in, resumed_at, lost_steps, difference))

    def finish(self, job: Job, fault: str, *overrides: str, allowed: int = 0) -> Start:
        """Start again until DONE, compare every number bit for bit, and add a row.

        A crash may lose the steps since the last checkpoint, and those since the one before where the last one was
        still being written; and as many more as the test has `allowed` by destroying checkpoints.
        """
        before, disturbed, was_done = job.last_step, job.starts[-1], job.done
        print(disturbed.acted)
        again = job.start()
        assert set(again.codes) == {0} and job.done, again.log
        resumed = before if was_done else again.resumed_at
        lost = before - resumed
        assert 0 <= lost <= before % INTERVAL + INTERVAL + allowed, f"{lost} steps lost; {again.log}"
        want = self.undisturbed(job.world, *overrides)
        assert difference(job.curve(), want.curve()) == ""
        assert same_tensors(job.final_state(), want.final_state())
        loss = job.records("loss")[-1]["loss"] - want.records("loss")[-1]["loss"]
        self.add(fault, disturbed.detected_in, resumed, lost, loss)
        return again


@pytest.fixture
def recovery(undisturbed: Callable[..., Job], pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Recovery:
    """Of the test's kind of fault: what its module's first line says, up to the colon."""
    kind = request.module.__doc__.partition(":")[0]
    return Recovery(undisturbed, kind, pytestconfig.stash[RECOVERIES])

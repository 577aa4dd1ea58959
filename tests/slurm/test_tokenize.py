"""`launch/tokenize.sh` as it is on a real Slurm; then every byte is that of one machine's undisturbed run."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ENDS = ("bin", "idx", "documents.npy", "manifest.json", "tokenizer.model")
TASKS = 4
TEXT = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"


@pytest.fixture(scope="module")
def settings(shard, tmp_path_factory) -> dict[str, str]:
    """The script's variables for 8 files of 3 to 16 MB, one of them with a bad line."""
    folder = tmp_path_factory.mktemp("input")
    for number in range(8):
        content = TEXT.read_bytes() * 8 * (number + 2) + (b'{"text": 1}\n' if number == 3 else b"")
        (folder / f"{number}.jsonl.zst").write_bytes(zstandard.compress(content))
    return {"INPUT": f"{folder}/*.zst", "TOKENIZER": str(shard.tokenizer), "BAD_DIR": str(folder / "bad")}


@pytest.fixture(scope="module")
def expected(site, settings) -> Path:
    """The prefix of the shard that the script makes without Slurm."""
    prefix = site.root / "one_machine"
    command = ["bash", "-c", "source launch/site.env && exec bash launch/tokenize.sh"]
    environment = os.environ | settings | {"OUTPUT": str(prefix)}
    done = subprocess.run(command, cwd=site.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return prefix


@dataclass(frozen=True)
class Array:
    """The array that a test disturbs, and what becomes of it."""

    site: Any
    job: Any
    prefix: Path

    @property
    def tasks(self) -> list:
        return self.job.tasks(*range(TASKS))

    @property
    def join(self):
        """The joining job, as the first task's log calls it."""
        first = self.tasks[0]
        first.wait_for(lambda: "joins the parts" in first.text(), "the joining job")
        numbers = set(re.findall(r"job (\d+) joins the parts", first.text()))
        assert len(numbers) == 1
        return self.site.job(numbers.pop())

    def processes(self, task: int) -> dict[str, bytes]:
        return {"command": b"python", "environment": b"SLURM_ARRAY_TASK_ID=%d\0" % task}

    def working(self, task: int) -> bool:
        """Whether the task has begun with its files: there are more processes than one."""
        return len(self.site.cluster.running(**self.processes(task))) > 3

    def wait_for_end(self, restarts: list[int]) -> None:
        for task in self.tasks:
            task.wait_for_end()
        assert [task.restarts for task in self.tasks] == restarts
        self.join.wait_for_end()
        jobs = self.site.cluster.slurm("squeue", "--states=all", "--noheader", f"--name=tokenize-join-{self.job.id}")
        assert len(jobs.splitlines()) == 1


@pytest.fixture
def submit(request, site, settings) -> Iterator[Callable[..., Array]]:
    """Submit the array of four; where the test fails, its jobs don't stay in the way of the next."""
    prefix = site.root / request.node.name

    def run(**environment: str) -> Array:
        options = (f"--array=0-{TASKS - 1}", "--cpus-per-task=1")
        environment = settings | {"OUTPUT": str(prefix)} | environment
        return Array(site, site.sbatch(*options, "launch/tokenize.sh", **environment), prefix)

    yield run
    site.cluster.slurm("scancel", "--full", "--user=root")


@pytest.fixture
def same_shard(expected, record_property) -> Callable[[Array, str], None]:
    """Asserts that the shard is there and the one machine's, byte for byte; notes what happened."""

    def check(array: Array, happened: str) -> None:
        for end in ENDS:
            assert Path(f"{array.prefix}.{end}").read_bytes() == Path(f"{expected}.{end}").read_bytes(), end
        assert not Path(f"{array.prefix}.parts").exists()
        record_property("happened", happened)

    return check


def test_array(submit, same_shard):
    array = submit()
    array.wait_for_end(restarts=[0, 0, 0, 0])
    for number, task in enumerate(array.tasks):
        assert f"--task {number}/4" in task.text() and "2 files tokenized, 0 taken" in task.text()
    assert "0 files tokenized, 8 taken" in array.join.text()
    assert f"data.train={array.prefix}" in array.join.text()
    same_shard(array, "four tasks, then the joining job")


def test_tokenizer_killed(submit, same_shard):
    array = submit()
    task = array.tasks[1]
    task.wait_for(lambda: array.working(1), "workers")
    [main] = array.site.cluster.running(b"data_tools.tokenize", array.processes(1)["environment"])
    os.kill(main, signal.SIGKILL)
    array.wait_for_end(restarts=[0, 1, 0, 0])
    assert "ended with 137" in task.text() and "requeue: killed by signal 9" in task.text()
    same_shard(array, "kill -9 of a task's Python, requeued")


@pytest.mark.parametrize("number", [0, TASKS - 1])  # the one that submits the joining job; the one with the array's id
def test_task_requeued_from_outside(submit, same_shard, number):
    array = submit()
    task = array.tasks[number]
    task.wait_for(lambda: array.working(number), "workers")
    array.site.cluster.slurm("scontrol", "requeue", task.id)
    array.wait_for_end(restarts=[int(number == n) for n in range(TASKS)])
    same_shard(array, f"scontrol requeue of task {number}")


@pytest.mark.parametrize("number", [0, TASKS - 1])
def test_task_at_its_time_limit(submit, same_shard, number):
    array = submit()
    task = array.tasks[number]
    task.wait_for(lambda: array.working(number), "workers")
    task.reach_time_limit(minutes=2, **array.processes(number))
    task.wait_for(lambda: task.restarts == 1, "requeue")
    array.site.cluster.slurm("scontrol", "update", f"JobId={task.id}", "TimeLimit=60")
    array.wait_for_end(restarts=[int(number == n) for n in range(TASKS)])
    assert "requeue: time limit" in task.text() and "interrupted; run the same command again" in task.text()
    same_shard(array, f"USR1 by Slurm to task {number}, requeued")


def test_bad_input_is_not_requeued(submit, same_shard):
    array = submit(BAD_DIR="")
    array.tasks[3].wait_for_end("FAILED")
    array.join.wait_for_end("CANCELLED")
    assert array.tasks[3].restarts == 0
    assert "3.jsonl.zst:" in array.tasks[3].text() and "not requeued" in array.tasks[3].text()
    for task in array.tasks[:3]:
        task.wait_for_end()
    again = submit()
    again.wait_for_end(restarts=[0, 0, 0, 0])
    assert "0 files tokenized, 2 taken" in again.tasks[0].text()
    same_shard(again, "stopped at a bad line, not requeued, nothing joined; with BAD_DIR: went on")


def test_dataset(submit, site, record_property):
    """With TOKENS the joining job makes a dataset of the parts."""
    folder = site.root / "dataset"
    array = submit(TOKENS="all", SUBSET_OUTPUT=str(folder))
    array.wait_for_end(restarts=[0, 0, 0, 0])
    manifest = json.loads((folder / "dataset.json").read_text())
    # Each text is there many times, and taken once.
    assert manifest["documents"] == len(TEXT.read_text().splitlines())
    assert f"data.train={folder}" in array.join.text()
    record_property("happened", "four tasks, then a dataset of distinct documents")

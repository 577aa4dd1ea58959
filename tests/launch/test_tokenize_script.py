"""`launch/tokenize.sh`: the real tokenizer, stand-ins for sbatch and scontrol, and for Python where it plays an end."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tokenize.sh"
TEXT = ROOT / "tests" / "data" / "sotu_small.jsonl"
ENDS = ("bin", "idx", "documents.npy", "manifest.json", "tokenizer.model")

NOTE = """#!/bin/bash
{ printf '%q ' "$@"; echo "restarts=${SLURM_RESTART_COUNT:-}"; } >>"$CALLS/${0##*/}"
"""
SBATCH = NOTE + "[[ -n ${NO_SBATCH:-} ]] && exit 1\necho 77\n"
# Plays tokenizing as told by PLAY: an exit code, "kill", or "wait" until it is interrupted.
PYTHON = f"""#!{sys.executable} -SE
import os, signal, sys, time
with open(os.environ["CALLS"] + "/python", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
play = os.environ["PLAY"]
if "finish" in play:
    open(os.environ["OUTPUT"] + ".parts/x.done.json", "w")
if "kill" in play:
    os.kill(os.getpid(), signal.SIGKILL)
if "wait" in play:
    try:
        with open(os.environ["READY"], "w") as pipe:
            pipe.write(str(os.getpid()).rjust(10))
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(int(play.split()[-1]))
"""


@dataclass
class Workplace:
    """A folder with the script, settings for it, and what the stand-ins noted."""

    root: Path
    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return Path(self.environment["OUTPUT"])

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", str(self.root / "spool_copy"), *arguments],  # Slurm runs a copy, elsewhere
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """(exit code, output)."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, name: str) -> list[list[str]]:
        path = self.root / "calls" / name
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    def play(self, what: str) -> None:
        """A stand-in for Python from now on."""
        write_command(self.root / "bin" / "python", PYTHON)
        self.environment["PLAY"] = what
        Path(f"{self.output}.parts").mkdir()


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def task(number: int, count: int = 3, attempt: int = 0, first: int = 0, step: int = 1) -> dict[str, str]:
    """Slurm's variables for a task of the array 4321, the number-th of so many. The last one has the array's own id."""
    variables = {
        "JOB_ID": 4321 if number == count - 1 else 4322 + number,
        "JOB_NAME": "tokenize",
        "JOB_PARTITION": "cpu",
        "CPUS_PER_TASK": 1,
        "ARRAY_JOB_ID": 4321,
        "ARRAY_TASK_ID": first + number * step,
        "ARRAY_TASK_MIN": first,
        "ARRAY_TASK_MAX": first + (count - 1) * step,
        "ARRAY_TASK_STEP": step,
        "ARRAY_TASK_COUNT": count,
    }
    variables |= {"RESTART_COUNT": attempt} if attempt else {}  # unset the first time
    return {f"SLURM_{name}": str(value) for name, value in variables.items()}


JOIN = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"}


@pytest.fixture
def workplace(tmp_path, shard) -> Iterator[Workplace]:
    for name in ("bin", "calls", "input", "launch"):
        (tmp_path / name).mkdir()
    write_command(tmp_path / "bin" / "sbatch", SBATCH)
    write_command(tmp_path / "bin" / "scontrol", NOTE)
    write_command(tmp_path / "bin" / "python", f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    shutil.copy(SCRIPT, tmp_path / "spool_copy")
    (tmp_path / "data_tools").symlink_to(ROOT / "data_tools")
    lines = TEXT.read_text().splitlines(keepends=True)
    for number in range(5):
        (tmp_path / f"input/{number}.jsonl").write_text("".join(lines[number * 2 :][:2]))
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "INPUT": "input/[0-2].jsonl input/[34].jsonl",
        "TOKENIZER": str(shard.tokenizer),
        "OUTPUT": str(tmp_path / "made" / "out"),
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "made").mkdir()
    workplace = Workplace(tmp_path, environment)
    yield workplace
    for process in workplace.started:
        if process.poll() is None:  # a test that failed: leave none of its processes
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def ready(workplace) -> Iterator[Callable[[], int]]:
    """Waits until the stand-in Python runs; returns its process id."""
    path = workplace.root / "ready"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)  # both ends: neither side waits for the other to open it
    workplace.environment["READY"] = str(path)

    def wait() -> int:
        assert select.select([pipe], [], [], 60)[0], "Python never started"
        return int(os.read(pipe, 10))

    yield wait
    os.close(pipe)


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{end}").read_bytes() for end in ENDS]


# The file


def test_slurm_is_asked_for_what_the_script_relies_on():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["signal"] == "B:USR1@120" and "requeue" in asked
    assert (asked["nodes"], asked["ntasks"], asked["open-mode"]) == ("1", "1", "append")
    assert asked["array"].startswith("0-")
    assert "/" not in asked["output"]  # a directory that is missing would lose the log
    assert text.index("\ncd ") > text.rindex("\n#SBATCH")  # Slurm stops reading at the first command


# With the real tokenizer


def test_one_machine_and_an_array_give_the_same_shard(workplace):
    code, output = workplace.run(OUTPUT=f"{workplace.output}.alone")
    assert code == 0 and f"data.train={workplace.output}.alone" in output, output
    assert f"--workers {len(os.sched_getaffinity(0))}" in output  # whatever OMP_NUM_THREADS says
    assert not workplace.calls("sbatch")
    for number in (1, 0, 2):
        code, output = workplace.run(**task(number))
        assert code == 0, output
        assert f"{2 if number < 2 else 1} files tokenized, 0 taken" in output
    assert not Path(f"{workplace.output}.bin").exists()
    code, output = workplace.run("join", **JOIN)
    assert code == 0 and f"data.train={workplace.output}" in output, output
    assert "0 files tokenized, 5 taken" in output
    assert files_of(workplace.output) == files_of(Path(f"{workplace.output}.alone"))
    assert not workplace.calls("scontrol")


def test_with_tokens_both_make_the_same_dataset(workplace):
    chosen = {"TOKENS": "all", "SEED": "3"}
    alone, joined = workplace.root / "alone", workplace.root / "joined"
    code, output = workplace.run(OUTPUT=f"{workplace.output}.alone", SUBSET_OUTPUT=str(alone), **chosen)
    assert code == 0 and f"data.train={alone}" in output, output
    workplace.run(**task(0, count=1))
    code, output = workplace.run("join", SUBSET_OUTPUT=str(joined), **chosen, **JOIN)
    assert code == 0 and f"data.train={joined}" in output, output
    manifest = (alone / "dataset.json").read_bytes()
    assert manifest == (joined / "dataset.json").read_bytes()
    assert (json.loads(manifest)["documents"], json.loads(manifest)["rule"]["seed"]) == (10, 3)


def test_bad_input_is_not_requeued_and_bad_dir_sets_it_aside(workplace):
    with (workplace.root / "input/1.jsonl").open("a") as file:
        file.write("{\n")
    code, output = workplace.run(**task(1))
    assert code == 1 and "input/1.jsonl:3: broken JSON" in output and "not requeued" in output
    code, output = workplace.run(BAD_DIR=str(workplace.root / "bad"), **task(1))
    assert code == 0, output
    assert len(list((workplace.root / "bad").iterdir())) == 1
    assert not workplace.calls("scontrol")


def test_a_missing_part_keeps_the_dataset_from_being_made(workplace):
    workplace.run(**task(0, count=2))
    code, output = workplace.run("join", TOKENS="all", SUBSET_OUTPUT=str(workplace.root / "set"), **JOIN)
    assert code == 1 and "2 of 5 parts are not finished (input/1.jsonl, input/3.jsonl)" in output


# The joining job


def test_the_first_task_submits_it_once(workplace):
    workplace.play("0")
    for number, attempt in ((1, 0), (0, 0), (0, 1), (2, 0)):
        code, output = workplace.run(
            SLURM_JOB_ACCOUNT="lab", JOIN_OPTIONS="--time=7 --mem=9G", **task(number, attempt=attempt)
        )
        assert code == 0, output
        assert ("job 77 joins the parts" in output) == (number == 0)
    [call] = workplace.calls("sbatch")
    assert {
        "--parsable",
        "--dependency=afterok:4321,singleton",
        "--kill-on-invalid-dep=yes",
        "--job-name=tokenize-join-4321",
        "--partition=cpu",
        "--account=lab",
        "--requeue",
        "--signal=B:USR1@120",
        "--time=7",
        "--mem=9G",
        "--wrap=bash launch/tokenize.sh join",
    } <= set(call)
    assert not any(word.startswith("--qos") for word in call)
    assert not any("/" in word for word in call if word.startswith("--output"))


def test_a_crash_before_that_was_noted_submits_it_again_and_not_as_a_restart(workplace):
    workplace.play("0")
    workplace.run(**task(0, attempt=2))
    [call] = workplace.calls("sbatch")
    assert call[-1] == "restarts="


def test_where_nodes_may_not_submit_a_person_is_told_how(workplace):
    workplace.play("0")
    code, output = workplace.run(NO_SBATCH="1", **task(0))
    assert code == 0
    assert "sbatch --cpus-per-task=1 --time=24:00:00 --wrap='bash launch/tokenize.sh join'" in output
    workplace.run(**task(0, attempt=1))
    assert len(workplace.calls("sbatch")) == 2


# What is started


def test_any_whole_range_is_an_array(workplace):
    workplace.play("0")
    for number in range(3):
        workplace.run(**task(number, first=10, step=4))
    assert [call[call.index("--task") + 1] for call in workplace.calls("python")] == ["0/3", "1/3", "2/3"]


def test_an_array_with_gaps_is_refused(workplace):
    workplace.play("0")
    code, output = workplace.run(**task(2) | {"SLURM_ARRAY_TASK_COUNT": "2"})
    assert code == 1 and "array with gaps" in output
    assert not workplace.calls("python")


def test_settings_come_from_site_env(workplace):
    workplace.play("0")
    (workplace.root / "launch/site.env").write_text(": $UNSET\nBAD_DIR='two words'\nSEED=5\n")
    more = {
        "EXCLUDE": "a\nb",
        "TOKENS": "1e3",
        "SUBSET_OUTPUT": "set",
        "INPUT": "input/[0-2].jsonl\ninput/[34].jsonl\n",
    }
    code, output = workplace.run(**more)
    assert code == 0, output
    tokenizing, choosing = (" ".join(call) for call in workplace.calls("python"))
    assert "--input input/[0-2].jsonl input/[34].jsonl --tokenizer" in tokenizing
    assert tokenizing.endswith("--bad-dir two words --parts-only")
    assert f"--input {workplace.output} --exclude a b --tokens 1e3 --seed 5 --output set --workers" in choosing


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"INPUT": ""}, "set INPUT to globs"),
        ({"OUTPUT": ""}, "set OUTPUT to a prefix"),
        ({"TOKENS": "all"}, "set SUBSET_OUTPUT"),
    ],
)
def test_missing_settings(workplace, settings, said):
    code, output = workplace.run(**settings)
    assert code == 1 and said in output


# How it ends


def test_time_limit_interrupts_and_requeues_this_task_alone(workplace, ready):
    workplace.play("wait")
    process = workplace.start(**task(2))  # with the array's id
    ready()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "requeue: time limit" in output
    assert workplace.calls("scontrol") == [["requeue", "4321_2", "restarts="]]


def test_term_interrupts_and_leaves_requeueing_to_slurm(workplace, ready):
    workplace.play("wait")
    process = workplace.start(**task(1))
    ready()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not workplace.calls("scontrol")


def test_control_c_on_one_machine(workplace, ready):
    workplace.play("wait")
    process = workplace.start(TOKENS="all", SUBSET_OUTPUT="set")
    ready()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "next:" not in output
    assert len(workplace.calls("python")) == 1  # nothing was chosen


def test_a_suspended_job_goes_on(workplace, ready):
    workplace.play("wait")
    process = workplace.start(**task(1))
    pid = ready()
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "T":
        os.sched_yield()
    process.send_signal(signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert "ended with 130" in output  # and not by the signal that stopped it
    assert workplace.calls("scontrol") == [["requeue", "4321_1", "restarts="]]


@pytest.mark.parametrize(
    ("play", "attempt", "requeued"),
    [("kill", 0, True), ("kill", 1, True), ("kill", 2, False), ("finish kill", 9, True), ("1", 0, False)],
)
def test_requeued_while_there_is_progress(workplace, play, attempt, requeued):
    workplace.play(play)
    code, output = workplace.run(**task(1, attempt=attempt))
    assert code == (0 if requeued else 1), output
    assert len(workplace.calls("scontrol")) == requeued
    if play == "kill" and not requeued:
        assert "giving up: killed by signal 9, and nothing finished in attempt 3" in output


def test_the_joining_job_is_requeued_by_its_own_number(workplace, ready):
    workplace.play("wait")
    process = workplace.start("join", **JOIN)
    ready()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert [call[:2] for call in workplace.calls("scontrol")] == [["requeue", "77"]]

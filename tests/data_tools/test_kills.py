"""kill -9 at random moments: what is made in the end is, byte for byte, what an undisturbed run makes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.shards import verify_shard
from data_tools.tokenize import tokenize

ROOT = Path(__file__).parents[2]
KILLS = 20
DEADLINE = 120.0  # seconds for a run that nobody kills; it takes two or three


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_again_and_again(command: list[str], made: Path, whole: dict[str, bytes], longest: float, done: str) -> int:
    """Run a command that makes the folder `made`, killed KILLS times, each at a moment of up to `longest` seconds.

    Each run goes on from what the one before left; one that ends is compared, and its work removed for the next.
    Returns how many kills left finished work (files `done`) that was not all of it.
    """
    draw, landed, amid = random.Random(5), 0, 0
    while landed < KILLS:
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE) as process:
            try:
                process.wait(timeout=draw.uniform(0, longest))
            except subprocess.TimeoutExpired:
                # Now the command alone, whose workers must end by themselves, now all of its processes.
                (os.kill if draw.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
                landed += 1
                amid += any(made.rglob(done)) and files_under(made) != whole
                continue
        assert process.returncode == 0
        assert files_under(made) == whole
        shutil.rmtree(made)
        made.mkdir()
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    assert files_under(made) == whole
    return amid


def undisturbed(command: list[str], made: Path) -> tuple[dict[str, bytes], float]:
    """What a command makes in the folder that nobody kills, and its seconds."""
    made.mkdir()
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    return files_under(made), time.monotonic() - started


@pytest.mark.slow
def test_tokenizing_survives_kills(tmp_path, input_folder, tokenizer_file):
    folder = input_folder(files=6, repeat=12)
    arguments = ["--input", f"{folder}/*", "--tokenizer", str(tokenizer_file), "--workers", "2"]
    command = [sys.executable, "-m", "data_tools.tokenize", *arguments, "--output"]
    whole, seconds = undisturbed([*command, f"{tmp_path}/whole/x"], tmp_path / "whole")
    (tmp_path / "killed").mkdir()

    amid = kill_again_and_again([*command, f"{tmp_path}/killed/x"], tmp_path / "killed", whole, seconds, "*.done.json")

    assert amid >= 4
    assert verify_shard(tmp_path / "killed" / "x") == []
    assert tokenize([f"{folder}/*"], str(tokenizer_file), tmp_path / "killed" / "x", 1).documents == 12 * 42


@pytest.mark.slow
def test_choosing_and_shuffling_survives_kills(tmp_path, input_folder, tokenizer_file):
    folder = input_folder(files=6, repeat=12)
    tokenize([f"{folder}/*"], str(tokenizer_file), tmp_path / "corpus", workers=1)
    arguments = ["--input", f"{tmp_path}/corpus", "--tokens", "80000", "--seed", "3", "--shard-tokens", "20000"]
    command = [sys.executable, "-m", "data_tools.subset", *arguments, "--workers", "2", "--output"]
    whole, seconds = undisturbed([*command, f"{tmp_path}/whole/x"], tmp_path / "whole")
    assert sum(name.endswith(".bin") for name in whole) >= 4
    (tmp_path / "killed").mkdir()

    amid = kill_again_and_again(
        [*command, f"{tmp_path}/killed/x"], tmp_path / "killed", whole, seconds, "selection.json"
    )

    assert amid >= 2

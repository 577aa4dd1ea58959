"""The watchdog against real processes: one that stands still alone, and two of which one is stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from pretrain.config import COLLECTIVE_TIMEOUT, LONGEST_STEP_TIMEOUT, Config
from pretrain.parallel.mesh import TIMEOUT

ALONE = """
import sys, threading
from pathlib import Path
from pretrain.watchdog import Watchdog

def read_forever():
    threading.Event().wait()

with Watchdog(Path(sys.argv[1]), 0, 1, timeout=1.0) as dog:
    for step in range(3):
        dog.beat(step, 100 * step)
    read_forever()
"""

PAIR = """
import os, sys, torch.distributed as dist
from pathlib import Path
from pretrain.parallel.mesh import init_mesh
from pretrain.watchdog import Watchdog

with init_mesh(1) as mesh, Watchdog(Path(sys.argv[1]), mesh.rank, 2, timeout=2.0) as dog:
    mesh.any(False)
    if mesh.rank == 1:
        print(os.getpid(), flush=True)
        while True:
            dog.beat(7, 700)  # the rank believes that it gets on; then it is stopped
    dog.beat(7, 700)
    mesh.any(True)
"""


def run(tmp_path: Path, text: str, **environment: str) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(text)
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_stands_still_is_ended_with_its_stack(tmp_path: Path) -> None:
    process = run(tmp_path, ALONE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no progress for 1 s; stacks in" in errors
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["reason"], status["step"], status["consumed_tokens"]) == ("hang", 2, 200)
    assert "no progress for 1 s after step 2: rank 0: no collective in read_forever (script.py:" in status["detail"]
    stacks = (tmp_path / "run/logs/hang-2/rank_00000.txt").read_text()
    assert "read_forever" in stacks and "Thread 0x" in stacks


def test_a_stopped_rank_is_told_from_the_one_that_waits_for_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    waiting = run(tmp_path, PAIR, RANK="0", **world)
    stopped = run(tmp_path, PAIR, RANK="1", **world)
    try:
        assert stopped.stdout.readline() == f"{stopped.pid}\n"
        stopped.send_signal(signal.SIGSTOP)
        waiting.communicate(timeout=120)
    finally:
        stopped.kill()
    assert waiting.returncode == 1
    detail = json.loads((tmp_path / "run/status.json").read_text())["detail"]
    assert "no progress for 2 s after step 7: rank 0: all_gather in gather (mesh.py:" in detail
    assert detail.endswith("rank 1: no answer: stopped or gone")


def test_the_watchdog_is_the_first_to_end_a_hang() -> None:
    """Were a collective's time-out the shorter one, nobody would hear where the ranks were."""
    assert TIMEOUT.total_seconds() == COLLECTIVE_TIMEOUT
    assert Config().recovery.step_timeout <= LONGEST_STEP_TIMEOUT < COLLECTIVE_TIMEOUT - 60


def test_a_log_that_takes_no_line_does_not_save_a_hanging_job(tmp_path: Path) -> None:
    """The disk of the run may be full, and the log lies on it."""
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, str(script), str(tmp_path / "run")]
        assert subprocess.run(command, env=environment, stdout=full, stderr=full, timeout=120).returncode == 1
    assert json.loads((tmp_path / "run/status.json").read_text())["reason"] == "hang"


STUCK = """
import ctypes, sys
from pathlib import Path
from pretrain import watchdog

watchdog.LAST_RESORT = 0.5
with watchdog.Watchdog(Path(sys.argv[1]), 0, 1, timeout=1.0):
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no thread of it runs
"""


def test_a_process_stuck_in_c_is_ended_too(tmp_path: Path) -> None:
    process = run(tmp_path, STUCK)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 1
    assert "Timeout (0:00:01.500000)!" in errors and "script.py" in errors

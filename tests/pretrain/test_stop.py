"""What asks a run to stop, as one process sees it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.stop import Stop, StopRequest


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once_however_often_it_comes(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(tmp_path / "STOP") as stop:
        assert stop.wanted() is Stop.NONE and not stop.urgent
        for _ in range(1 if number == signal.SIGINT else 20):
            os.kill(os.getpid(), number)
        assert stop.wanted() is Stop.SIGNAL
        assert stop.urgent == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_files_ask_too(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "STOP", tmp_path / "job")
    assert stop.wanted() is Stop.NONE
    (tmp_path / "job").touch()
    assert stop.wanted() is Stop.SIGNAL
    (tmp_path / "STOP").touch()
    assert stop.wanted() is Stop.STOP_FILE


PATIENT = """
import signal, sys, time
from pathlib import Path
from pretrain import stop

stop.AGAIN = 0.0
with stop.StopRequest(Path("STOP")) as request:
    print("ready", flush=True)
    while request.wanted() is stop.Stop.NONE:
        time.sleep(0.01)
    print("asked", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "patient.py"
    script.write_text(PATIENT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True)
    for word in ("ready", "asked"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130

"""Starts jobs by forking: torch, DeepSpeed and megatron-core are imported once, not for seconds by each rank.

    launcher.py     reads a job a line (JSON) from stdin, runs it, answers with a line on stdout

Plays torchrun's part: ranks with its variables, and when one ends badly the others are told (TERM), then killed.
"""

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pretrain.parallel.zero  # noqa: F401  DeepSpeed, which main imports late
from pretrain.train import main

torch.set_num_threads(1)  # before a fork: a pool's threads don't survive it
from faults import Fault, install  # noqa: E402

PR_SET_PDEATHSIG = 1


@dataclass
class Rank:
    pid: int
    descriptor: int
    code: int | None = None

    def ended(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        os.close(self.descriptor)

    def send(self, number: signal.Signals) -> None:
        if self.code is None:
            signal.pidfd_send_signal(self.descriptor, number)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Start `world` ranks and wait for their ends: codes (negative: the signal), seconds, whether time was up."""
    started, port = time.time(), free_port()
    ranks = [start_rank(job, rank, port) for rank in range(job["world"])]
    timed_out = not wait(ranks, time.monotonic() + job["limit"], until_failure=True)
    if timed_out:
        for rank in ranks:
            rank.send(signal.SIGABRT)  # faulthandler writes its stacks to the log
    else:
        for rank in ranks:
            rank.send(signal.SIGTERM)
    if not wait(ranks, time.monotonic() + job["grace"]):
        for rank in ranks:
            rank.send(signal.SIGKILL)
        wait(ranks, time.monotonic() + job["limit"])
    return {"codes": [r.code for r in ranks], "started": started, "ended": time.time(), "timed_out": timed_out}


def wait(ranks: list[Rank], deadline: float, until_failure: bool = False) -> bool:
    """Until all ranks have ended, or the first badly; False where the deadline came first."""
    poll = select.poll()
    running = {r.descriptor: r for r in ranks if r.code is None}
    for descriptor in running:
        poll.register(descriptor, select.POLLIN)
    while running:
        ended = poll.poll(max(0, deadline - time.monotonic()) * 1000)
        if not ended:
            return False
        for descriptor, _ in ended:
            poll.unregister(descriptor)
            rank = running.pop(descriptor)
            rank.ended()
            if until_failure and rank.code:
                return True
    return True


def start_rank(job: dict[str, Any], rank: int, port: int) -> Rank:
    launcher = os.getpid()
    if pid := os.fork():
        group = job.setdefault("group", pid)  # the first one's
        os.setpgid(pid, group)
        return Rank(pid, os.pidfd_open(pid))
    code = 1
    try:
        os.setpgid(0, job.get("group", 0))
        CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        code = be_rank(job, rank, port)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_rank(job: dict[str, Any], rank: int, port: int) -> int:
    for descriptor, path in enumerate(("/dev/null", f"{job['log']}.{rank}")):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, descriptor)
    os.dup2(1, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "LOCAL_WORLD_SIZE": job["world"]}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if job["world"] > 1 else {}
    os.environ.update({name: str(value) for name, value in place.items()})
    install([Fault(**fault) for fault in job["faults"]], rank, Path(job["faults_log"]))
    return main(job["arguments"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread: forks would lose it"
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()

"""A node apart from its GPUs and software: disks, names, clock."""

import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.preflight.command import CommandError, ask
from launch.preflight.findings import Finding, setting
from launch.preflight.software import Software

GIB = 2**30
SCONTROL_SECONDS = 20.0
CLOCK_SECONDS = 5.0  # a clock may differ by so much
START_SECONDS = 90.0  # and this process may start so long after its head node's time was taken


def check_disks(run_dir: Path, software: Software) -> list[Finding]:
    """Room for the run, for compiled kernels and for what NCCL and gloo share between processes."""
    return [
        _disk("run disk", run_dir, *_run_need(run_dir, software)),
        _disk("/tmp", Path("/tmp"), setting("MIN_TMP_GIB", 2), "MIN_TMP_GIB"),
        _disk("/dev/shm", Path("/dev/shm"), setting("MIN_SHM_GIB", 1), "MIN_SHM_GIB"),
    ]


def _run_need(run_dir: Path, software: Software) -> tuple[float, str]:
    """GiB that must be free, and why: what keep_last still wants, and the next, complete before one is removed."""
    if os.environ.get("MIN_FREE_GIB"):
        return setting("MIN_FREE_GIB", 0), "MIN_FREE_GIB"
    held = len(list((run_dir / "checkpoints").glob("step_*")))
    count = software.keep_last + 1 - min(held, software.keep_last)
    return count * (software.checkpoint_bytes or 0) / GIB, f"checkpoints to come: {count}"


def _disk(check: str, path: Path, needed: float, why: str) -> Finding:
    try:
        free = shutil.disk_usage(path).free / GIB
    except OSError as error:
        return Finding(check, "bad", f"{path}: {error.strerror}")
    room = f"{path} has {free:.1f} GiB free, needs {needed:.1f} ({why})"
    return Finding.of(check, [room] if free < needed else [], room)


def check_clock(run_dir: Path, head_time: float | None) -> Finding:
    """This node's clock against the run's disk and the job's first node.

    A file server stamps what is written with its own time, which shows a difference either way; a disk that stamps with
    the writer's time (a local one, Lustre) shows nothing. The first node's time was taken before this process started:
    to be behind it is wrong, to be ahead takes a minute or more to tell from a slow start.
    """
    try:
        offset = _disk_offset(run_dir)
    except OSError as error:
        return Finding("clock", "bad", f"cannot write to {run_dir}: {error.strerror}")
    problems = []
    if abs(offset) > CLOCK_SECONDS:
        problems.append(f"the clock differs by {offset:+.1f} s from that of the disk of {run_dir}")
    late = 0.0 if head_time is None else time.time() - head_time
    if not -CLOCK_SECONDS <= late <= START_SECONDS:
        problems.append(f"the clock differs by {late:+.1f} s from the first node's")
    return Finding.of("clock", problems, f"{offset:+.1f} s from the run disk's")


def _disk_offset(run_dir: Path) -> float:
    """Seconds that the node's clock is ahead of what the disk stamps a new file with; 0 within the writing's time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".clock.{socket.gethostname()}.{os.getpid()}"
    before = time.time()
    try:
        probe.write_bytes(b"written to read its time\n")
        stamp = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    after = time.time()
    return before - stamp if stamp < before else min(0.0, after - stamp)


def check_names(own: str) -> Finding:
    """Every node of the job has an address, and another's is not this machine's own."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        return Finding("names", "ok", "not in a Slurm job: no other nodes")
    try:
        hosts = ask("scontrol", "show", "hostnames", nodelist, seconds=SCONTROL_SECONDS).split()
    except CommandError as error:
        return Finding("names", "bad", str(error))
    with ThreadPoolExecutor(32) as pool:
        problems = [problem for problem in pool.map(lambda host: _name_problem(host, own), hosts) if problem]
    return Finding.of("names", problems, f"{len(hosts)} nodes have addresses")


def _name_problem(host: str, own: str) -> str | None:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        return f"{host}: {error.strerror}"
    if host != own and any(address.startswith("127.") or address == "::1" for address in addresses):
        return f"{host}: is {', '.join(sorted(addresses))}, this machine itself"
    return None

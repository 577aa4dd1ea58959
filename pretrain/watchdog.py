"""A thread on every rank that ends a job which has stopped making progress, and says where each rank was."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch

from pretrain.say import say
from pretrain.status import write_failure

OTHERS = 3.0  # seconds for the other ranks' watchdogs, whose clocks started when they last waited for each other
LAST_RESORT = 30.0  # seconds after which the process is ended even if the watchdog itself is stuck
LIBRARIES = ("/torch/", "/deepspeed/", "/megatron/", "/threading.py", "/concurrent/")


class Watchdog:
    """Ends the process with code 1 when `beat` was not called for `timeout` seconds (a collective alone: minutes).

    First every rank writes its threads' stacks to RUN/logs/hang-STEP/rank_XXXXX.txt; a rank without a file could not
    run at all. status.json gets the reason "hang" and what each rank waited in.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, timeout: float) -> None:
        self.run_dir, self.rank, self.world_size, self.timeout = run_dir, rank, world_size, timeout
        self._main = threading.get_ident()
        self._beat = (time.monotonic(), 0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat(0, 0)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._stop.set()
        self._thread.join()

    def beat(self, step: int, consumed_tokens: int) -> None:
        """Progress was made."""
        self._beat = (time.monotonic(), step, consumed_tokens)
        # Needs neither the interpreter's lock nor the run's disk, should this thread hang in one of those.
        faulthandler.dump_traceback_later(self.timeout + LAST_RESORT, exit=True, file=sys.__stderr__ or sys.stderr)

    def _watch(self) -> None:
        while not self._stop.wait(self._left()):
            if self._left() <= 0:
                self._end_job()

    def _left(self) -> float:
        return self._beat[0] + self.timeout - time.monotonic()

    def _end_job(self) -> None:
        _, step, consumed_tokens = self._beat
        folder = self.run_dir / "logs" / f"hang-{step}"
        try:
            self._write_stacks(folder)
            # Rank 0 speaks for all, and for itself another does where it can't.
            time.sleep(OTHERS * (1 + min(self.rank, 1)))
            detail = f"no progress for {self.timeout:g} s after step {step}: {self._account(folder)}"
            write_failure(self.run_dir, "hang", step, consumed_tokens, detail)
            say(f"rank {self.rank}: no progress for {self.timeout:g} s; stacks in {folder}", problem=True)
        finally:
            os._exit(1)

    def _write_stacks(self, folder: Path) -> None:
        """The first line says what the rank waits in; also NCCL's record of its last collectives."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._file(folder, self.rank).open("w") as file:
                file.write(waiting_in(self._main) + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            if torch.cuda.is_available():
                from torch._C import _distributed_c10d

                # Its flight recorder, kept where TORCH_FR_BUFFER_SIZE is set.
                trace = _distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                self._file(folder, self.rank).with_suffix(".nccl").write_bytes(trace)
        except Exception as error:  # a full disk must not keep the job from ending
            say(f"rank {self.rank}: stacks not written: {error}", problem=True)
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)

    @staticmethod
    def _file(folder: Path, rank: int) -> Path:
        return folder / f"rank_{rank:05d}.txt"

    def _account(self, folder: Path) -> str:
        """What the ranks wait in, equal answers together."""
        ranks: dict[str, list[str]] = {}
        for rank in range(self.world_size):
            path = self._file(folder, rank)
            said = path.read_text().partition("\n")[0] if path.exists() else "no answer: stopped or gone"
            ranks.setdefault(said, []).append(str(rank))
        return "; ".join(f"rank {', '.join(who)}: {said}" for said, who in ranks.items())


def waiting_in(thread: int) -> str:
    """The collective that a thread is in, and the line of this project that asked for it."""
    collective = where = None
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("/torch/distributed/distributed_c10d.py"):
            collective = name  # the outermost one: what was called
        elif where is None and not any(part in path for part in LIBRARIES):
            where = f"{name} ({os.path.basename(path)}:{frame.f_lineno})"
        frame = frame.f_back
    return f"{collective or 'no collective'} in {where}"

"""Train many cells side by side: a process for each, whose result is a file, so that a stopped grid goes on later."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import orjson
import torch

from data_tools.files import write_durably
from pretrain.mqar.config import Cell
from pretrain.mqar.train import CellResult, train_cell

FOLDER = "cells"  # in the output: a JSON file for each finished cell


class CellFailed(RuntimeError):
    """A cell's process ended without a result."""


def read_result(output: Path, cell: Cell) -> CellResult | None:
    """What the cell came to in an earlier run, or None. Raises ValueError, naming the file, for one that is damaged."""
    path = _path(output, cell)
    try:
        return CellResult(**orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: not a cell's result ({error}); delete it to train the cell again") from error


def train_cells(
    cells: Sequence[Cell], output: Path, device: str, workers: int, on_done: Callable[[Cell, CellResult], None]
) -> None:
    """Train each, at most `workers` at a time, on one CPU thread each; `on_done` hears of every end.

    Raises CellFailed where a process dies (its traceback is on stderr); the others are stopped then, as they are by
    any other exception. Finished cells are on disk, and no process outlives this one.
    """
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    # Forked from a server that has imported torch: a cell may take less time than the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.mqar.train"])
    waiting, running = list(reversed(cells)), dict[int, tuple[ForkServerProcess, Cell]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                process = context.Process(target=_work, args=(waiting[-1], output, device), daemon=True)
                process.start()
                running[process.sentinel] = (process, waiting.pop())
            for ended in connection.wait(list(running)):
                assert isinstance(ended, int)
                process, cell = running.pop(ended)
                process.join()
                result = read_result(output, cell)
                if result is None:
                    raise CellFailed(f"{cell.title}: its process ended with exit code {process.exitcode}")
                on_done(cell, result)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _work(cell: Cell, output: Path, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command stops its cells itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    result = train_cell(cell, torch.device(device))
    write_durably(_path(output, cell), orjson.dumps(asdict(result), option=orjson.OPT_INDENT_2))


def _end_with_parent() -> None:
    # After a kill -9 of the command no cell may be trained on beside those of the next run.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _path(output: Path, cell: Cell) -> Path:
    return output / FOLDER / f"{cell.key}.json"

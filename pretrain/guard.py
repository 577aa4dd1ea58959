"""Steps that must not update the model, and what follows when there are several in a row.

A step whose loss or gradient is not finite is skipped on all ranks: its tokens count as consumed, nothing is updated.
That mends a bad batch. A weight or a moment that went bad is not mended by it: after `max_skips` in a row the run goes
back to its last checkpoint and passes over those batches when it comes to them again. After `max_rollbacks` it stops:
somebody should look, and may then raise that number. A loss far above the last ones (`spike_sigmas`) is treated the
same, where that is set.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from pydantic import TypeAdapter

from data_tools.files import write_durably
from pretrain.checkpoint import Progress
from pretrain.config import RecoveryConfig


@dataclass(frozen=True)
class Rollback:
    """A return to the checkpoint of `to_step`: steps `first` to `last`, numbered as in metrics.jsonl, were bad."""

    to_step: int
    first: int
    last: int
    reason: str


class StepGuard:
    """Judges each step's loss and gradient, the same on every rank.

    `recent_losses`: of the trained steps before this one, from the checkpoint, so that a resumed run judges alike.
    """

    def __init__(self, config: RecoveryConfig, rollbacks: Sequence[Rollback], recent_losses: Sequence[float]) -> None:
        self.config, self.rollbacks = config, list(rollbacks)
        self._begin(recent_losses)

    def _begin(self, recent_losses: Sequence[float]) -> None:
        self.recent_losses = tuple(recent_losses)
        self.in_a_row: list[int] = []
        self.reason = ""

    def passes_over(self, step: int) -> bool:
        """Whether an earlier roll-back found step `step` bad."""
        return any(r.first <= step <= r.last for r in self.rollbacks)

    def judge_loss(self, loss: float) -> str | None:
        """Why a step of this loss must not update the model, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        sigmas, window = self.config.spike_sigmas, self.config.spike_window
        if sigmas is None or len(self.recent_losses) < window:
            return None
        mean, deviation = statistics.fmean(self.recent_losses), statistics.pstdev(self.recent_losses)
        if loss <= mean + sigmas * deviation:
            return None
        return f"loss {loss:.4f} is more than {sigmas:g} standard deviations of {deviation:.4f} above {mean:.4f}"

    def judge_gradient(self, norm: float) -> str | None:
        """Why a step of this gradient norm has not updated the model, or None."""
        return None if math.isfinite(norm) else "the gradient is not finite"

    def record(self, step: int, loss: float, problem: str | None) -> None:
        """Count a step that ended."""
        if problem:
            self.in_a_row.append(step)
            self.reason = problem
        else:
            self.in_a_row.clear()
            if self.config.spike_sigmas is not None:
                self.recent_losses = (*self.recent_losses, loss)[-self.config.spike_window :]

    def must_roll_back(self, last_step: bool) -> bool:
        """After the last step there is no other that could show that the model is sound."""
        return len(self.in_a_row) >= (1 if last_step else self.config.max_skips)

    @property
    def may_roll_back(self) -> bool:
        return len(self.rollbacks) < self.config.max_rollbacks

    def roll_back(self, to: Progress) -> None:
        """Note a return to a checkpoint, for the steps that were refused in a row, and go on from there."""
        self.rollbacks.append(Rollback(to.step, self.in_a_row[0], self.in_a_row[-1], self.reason))
        self._begin(to.recent_losses)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Of a run's earlier starts too: a crash after a roll-back must not train on what that left out."""
    path = run_dir / "rollbacks.json"
    return TypeAdapter(list[Rollback]).validate_json(path.read_bytes()) if path.exists() else []


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    write_durably(run_dir / "rollbacks.json", orjson.dumps([asdict(r) for r in rollbacks], option=orjson.OPT_INDENT_2))

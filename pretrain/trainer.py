"""The training loop: `Trainer.run` calls `train_step` until the tokens are consumed or a stop is asked for."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.files import write_durably
from longhorn_layers.model import LanguageModel
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointManifest, CheckpointWriter, Progress, SaveReport
from pretrain.config import Config, config_to_dict
from pretrain.data import IGNORED, TrainingData
from pretrain.guard import StepGuard, read_rollbacks, write_rollbacks
from pretrain.metrics import MetricsLog
from pretrain.optim import learning_rate
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor_parallel import shard_model
from pretrain.parallel.zero import ZeroEngine
from pretrain.read_ahead import ReadAhead
from pretrain.sample_order import ORDER
from pretrain.say import say
from pretrain.status import write_status
from pretrain.stop import Stop, StopRequest
from pretrain.validation import ValidationLoss
from pretrain.watchdog import Watchdog


class TrainingError(RuntimeError):
    """The run can't go on; its last checkpoint is sound."""


def build_model(config: Config, mesh: Mesh) -> LanguageModel:
    """The model's shard on this rank: the same weights for the same seed, whatever the mesh."""
    torch.manual_seed(config.train.seed)
    model = shard_model(LanguageModel(config.model), mesh)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


class Trainer:
    """A run on this rank: built from its config, resumed from its newest checkpoint if there is one.

    `allowed`: keys of `run_identity` that may differ from the checkpoint's. `from_step`: resume from that checkpoint;
    later ones are set aside. Raises CheckpointError where there is none to go on from.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        stop: StopRequest | None = None,
        allowed: Sequence[str] = (),
        from_step: int | None = None,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.run_dir = Path(config.run_dir)
        self.stop = stop or StopRequest(self.run_dir / "STOP")
        self.data = TrainingData(config, mesh)
        self.batches = ReadAhead(self.data.micro_batches, config.total_steps)
        self.validation = ValidationLoss(config, mesh) if config.data.valid and config.eval.interval else None
        self.identity = run_identity(config, self.data)
        self.engine = ZeroEngine(build_model(config, mesh), config, mesh)
        self.writer = CheckpointWriter(mesh, config, self.identity, tokenizer_record(self.data))
        self.saved_step: int | None = None
        self.unvalidated = False  # resumed from a stop that left no time for it
        self.stopping = Stop.NONE
        self.forward_seconds: tuple[float, ...] = ()  # of each rank, in the last step
        self.data_seconds: tuple[float, ...] = ()  # that each rank waited for the last step's data
        self.progress = Progress()
        self._resume(allowed, from_step)
        rollbacks = mesh.from_first(read_rollbacks(self.run_dir) if mesh.rank == 0 else None)
        self.guard = StepGuard(config.recovery, rollbacks, self.progress.recent_losses)

    def run(self) -> str:
        """Train to total_tokens; returns why it ended: "done", "signal" or "stop_file"."""
        log = MetricsLog(self.config, self.mesh.world_size, self.progress.step) if self.mesh.rank == 0 else None
        with (
            Watchdog(self.run_dir, self.mesh.rank, self.mesh.world_size, self.config.recovery.step_timeout) as dog,
            self.batches,
        ):
            self._agree(log)
            if self.saved_step is None and not self.stopping:
                self.save(log=log)  # a disk that refuses it shows now, and a roll-back has where to go
            if self.unvalidated:
                self._validate_if_due(log, dog)
            while not (self.stopping or self.finished):
                values = self.train_step()
                dog.beat(self.progress.step, self.progress.consumed_tokens)
                self._agree(log)
                if log and values:
                    self._record(log, values)
                if self.guard.must_roll_back(self.finished) and not self.stopping:
                    self._roll_back(log)
                    continue
                loss = self._validate_if_due(log, dog)
                if self._save_is_due():
                    self.save(loss, log)
            self._log_save(log, self.writer.wait())
        reason = self._leave()
        if log:
            log.close()
        return reason

    def _leave(self) -> str:
        complete = self.finished and self.saved_step == self.progress.step and not self.unvalidated
        reason = "done" if complete else self.stopping.name.lower()
        if self.mesh.rank == 0:
            write_status(self.run_dir, reason, self.progress.step, self.progress.consumed_tokens)
            if complete:
                write_durably(self.run_dir / "DONE", b"")
        return reason

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.total_steps

    def _due(self, interval: int) -> bool:
        return self.finished or self.progress.step % interval == 0

    def _save_is_due(self) -> bool:
        """At a multiple of the interval, and as soon as may be where that one was passed by.

        Not between steps that were skipped, as the model may be what is wrong, unless there is no later.
        """
        step, interval, saved = self.progress.step, self.config.checkpoint.interval, self.saved_step or 0
        due = bool(self.stopping) or self._due(interval) or step - saved >= interval
        return due and (bool(self.stopping) or not self.guard.in_a_row) and self.saved_step != step

    def _agree(self, log: MetricsLog | None) -> None:
        """What ranks tell each other after each step: stops, failed saves, how long their own work took.

        Raises CheckpointError, on every rank at the same step, where a save in the background failed.
        """
        own = [float(self.stop.wanted()), float(self.writer.failed())]
        own += [self.engine.forward_clock.read(), self.batches.waited_seconds]
        stops, failures, self.forward_seconds, self.data_seconds = zip(*self.mesh.gather(own), strict=True)
        self.stopping = Stop(int(max(stops)))
        if any(failures):
            self.writer.wait()
        self._log_save(log, self.writer.finished())

    def _log_save(self, log: MetricsLog | None, report: SaveReport | None) -> None:
        if log and report:
            log.checkpoint(self.progress.step, report)

    def _record(self, log: MetricsLog, values: dict[str, Any]) -> None:
        step, seconds = self.progress.step, self.forward_seconds
        values |= {
            "forward_seconds_median": statistics.median(seconds),
            "forward_seconds_max": max(seconds),
            "slowest_rank": seconds.index(max(seconds)),
            "data_seconds": max(self.data_seconds),
        }
        log.train_step(step, self.progress.consumed_tokens, values)
        if step in self.guard.in_a_row:
            log.skipped(step, self.guard.reason, self.data.documents(step - 1))

    def _validate_if_due(self, log: MetricsLog | None, dog: Watchdog) -> float | None:
        """The validation loss at the training context, or None where none is due or a stop came in between.

        Then it is made up for.
        """
        if self.validation is None:
            return None
        self.unvalidated = self._due(self.config.eval.interval)
        if self.stopping or not self.unvalidated:
            return None

        def interrupted() -> bool:
            dog.beat(self.progress.step, self.progress.consumed_tokens)
            self.stopping = Stop(int(max(row[0] for row in self.mesh.gather([float(self.stop.wanted())]))))
            return bool(self.stopping)

        losses = self.validation.measure(self.engine, interrupted)
        self.unvalidated = losses is None
        if log and losses is not None:
            log.validation(self.progress.step, losses)
        if log:
            log.resume_clock()
        return None if losses is None else losses[self.config.data.seqlen]

    def train_step(self) -> dict[str, Any] | None:
        """One optimizer step over the global batch; returns its loss (nats per token), gradient norm and rate.

        A step that the guard refuses updates nothing ("skipped" says why); one that a roll-back found bad is passed
        over. None where the process is told to end at once: nothing happened.
        """
        if self.guard.passes_over(self.progress.step + 1):
            self._advance(updated=False)
            return {"loss": math.nan, "grad_norm": math.nan, "lr": 0.0, "skipped": "bad before a roll-back"}
        total, n_targets = self._accumulate_gradients()
        if total is None:
            return None
        [loss] = self.mesh.all_reduce([float(total)])
        loss, rate, norm = loss / n_targets, learning_rate(self.config, self.progress.consumed_tokens), math.nan
        problem = self.guard.judge_loss(loss)
        if problem:
            self.engine.discard_step()
        else:
            norm = self.engine.step(rate)
            problem = self.guard.judge_gradient(norm)
        self.guard.record(self.progress.step + 1, loss, problem)
        self._advance(updated=problem is None)
        return {"loss": loss, "grad_norm": norm, "lr": rate} | ({"skipped": problem} if problem else {})

    def _accumulate_gradients(self) -> tuple[torch.Tensor | None, float]:
        """This rank's summed loss and the global batch's targets; no loss where a stop can't wait for the rest."""
        batches = self.batches(self.progress.step)
        [n_targets] = self.mesh.all_reduce([float(sum(int((b["targets"] != IGNORED).sum()) for b in batches))])
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(batches):
            total += self.engine.forward_backward(batch, n_targets)
            if i + 1 < len(batches):
                self.engine.end_micro_batch()
                if self.mesh.any(self.stop.urgent):
                    return None, n_targets
        return total, n_targets

    def _advance(self, updated: bool) -> None:
        self.progress = Progress(
            self.progress.step + 1,
            self.progress.consumed_tokens + self.config.tokens_per_step,
            self.progress.optimizer_steps + updated,
            self.guard.recent_losses,
        )

    def save(self, validation_loss: float | None = None, log: MetricsLog | None = None) -> None:
        """Begin to write a checkpoint of where the run stands; `writer.wait` sees it complete."""
        self._log_save(log, self.writer.start(self.engine, self.progress, validation_loss))
        self.saved_step = self.progress.step

    def _roll_back(self, log: MetricsLog | None) -> None:
        """To the last checkpoint that was not tried yet, to pass over the steps that were skipped in a row.

        Raises TrainingError, with a report, where that was done often enough.
        """
        self._log_save(log, self.writer.wait())
        bad = self.guard.in_a_row
        report = f"steps {bad[0]} to {bad[-1]} updated nothing ({self.guard.reason})"
        if not self.guard.may_roll_back:
            raise TrainingError(
                f"{report}, after {len(self.guard.rollbacks)} roll-backs (rollbacks.json); skipped.jsonl in "
                f"{self.run_dir} has their documents. To go on all the same, raise recovery.max_rollbacks"
            )
        tried = {rollback.to_step for rollback in self.guard.rollbacks}
        folder = checkpoint.choose(self.mesh, self.run_dir, avoid=tried)
        if folder is None:
            raise TrainingError(f"{report}, and {self.run_dir} has no checkpoint to go back to")
        self._load(folder)
        self.guard.roll_back(self.progress)
        if log:
            write_rollbacks(self.run_dir, self.guard.rollbacks)
            log.rewind(self.progress.step)
            say(f"{report}: back to {folder}, passing over them from there")

    def _resume(self, allowed: Sequence[str], from_step: int | None) -> None:
        checkpoint.check_allowed(allowed, self.identity)
        folder = checkpoint.choose(self.mesh, self.run_dir, from_step)
        if folder is not None:
            manifest = self._load(folder, allowed)
            has_validated = manifest.validation_loss is not None or self.validation is None
            self.unvalidated = bool(self.saved_step) and not has_validated
            if self.mesh.rank == 0:
                say(f"resumed from {folder} at {self.progress.consumed_tokens:,} tokens")

    def _load(self, folder: Path, allowed: Sequence[str] = ()) -> CheckpointManifest:
        manifest = checkpoint.load(self.engine, self.mesh, folder, self.identity, allowed)
        self.progress, self.saved_step = manifest.progress, manifest.progress.step
        if self.mesh.rank == 0:
            checkpoint.set_back(folder)
        return manifest


def tokenizer_record(data: TrainingData) -> dict[str, Any]:
    """What a checkpoint says of the tokenizer that its tokens are of."""
    tokenizer = data.dataset.tokenizer
    return {name: getattr(tokenizer, name) for name in ("name", "sha256", "vocab_size", "eos_id")}


def run_identity(config: Config, data: TrainingData) -> dict[str, Any]:
    """What decides a run's numbers but for the topology: a resumed run must share it."""
    values = config_to_dict(config)
    return {
        "model": values["model"],
        "optim": values["optim"],
        "data": {
            "train_digest": data.dataset.digest,
            "blend": ", ".join(f"{name} {weight}" for name, weight in data.order.blend.weights.items()),
            "order": ORDER,
            "seqlen": config.data.seqlen,
            "reset_at_eos": config.data.reset_at_eos,
        },
        "tokenizer": {"sha256": data.dataset.tokenizer.sha256},
        "train": {key: values["train"][key] for key in ("total_tokens", "global_batch_size", "seed", "precision")},
    }

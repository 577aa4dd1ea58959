"""The training loop: `Trainer.run` calls `train_step` until the tokens are consumed or a signal comes."""

import signal
from pathlib import Path
from typing import Any

import torch

from data_tools.files import write_durably
from longhorn_layers.model import LanguageModel
from pretrain import checkpoint
from pretrain.checkpoint import Progress
from pretrain.config import Config, ConfigError, config_to_dict
from pretrain.data import IGNORED, TrainingData, read_manifest, token_stream, windows
from pretrain.metrics import MetricsLog, write_status
from pretrain.optim import learning_rate
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor_parallel import shard_model
from pretrain.parallel.zero import ZeroEngine


class TrainingError(RuntimeError):
    """The run can't go on; its last checkpoint is sound."""


class StopSignal:
    """SIGUSR1 (a time limit is near) or SIGTERM (preemption): finish the step, save, leave."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


def build_model(config: Config, mesh: Mesh) -> LanguageModel:
    """The model's shard on this rank: the same weights for the same seed, whatever the mesh."""
    torch.manual_seed(config.train.seed)
    model = shard_model(LanguageModel(config.model), mesh)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


class Trainer:
    """A run on this rank: built from its config, resumed from its newest checkpoint if there is one."""

    def __init__(self, config: Config, mesh: Mesh, stop: StopSignal | None = None) -> None:
        self.config, self.mesh, self.stop = config, mesh, stop
        self.run_dir = Path(config.run_dir)
        self.data = TrainingData(config, mesh)
        self.validation = ValidationLoss(config, mesh) if config.data.valid and config.eval.interval else None
        self.engine = ZeroEngine(build_model(config, mesh), config, mesh)
        self.progress = self._resume()

    def run(self) -> str:
        """Train to total_tokens; returns why it ended: "done" or "signal"."""
        log = MetricsLog(self.config, self.mesh.world_size, self.progress.step) if self.mesh.rank == 0 else None
        stopping = False
        while not (stopping or self.finished):
            values = self.train_step()
            if log:
                log.train_step(self.progress.step, self.progress.consumed_tokens, values)
            stopping = self.mesh.any(self.stop is not None and self.stop.received)
            saved = stopping or self._due(self.config.checkpoint.interval)
            if saved:
                self.save()
            validated = not stopping and self._validate_if_due(log)
            if log and (saved or validated):
                log.resume_clock()
        reason = "done" if self.finished else "signal"
        if log:
            log.close()
            write_status(self.run_dir, reason, self.progress.step)
            if reason == "done":
                write_durably(self.run_dir / "DONE", b"")
        return reason

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.total_steps

    def _due(self, interval: int) -> bool:
        return self.finished or self.progress.step % interval == 0

    def _validate_if_due(self, log: MetricsLog | None) -> bool:
        if self.validation is None or not self._due(self.config.eval.interval):
            return False
        loss = self.validation.measure(self.engine)
        if log:
            log.validation(self.progress.step, loss)
        return True

    def train_step(self) -> dict[str, float]:
        """One optimizer step over the global batch; returns its loss (nats per token), gradient norm and rate.

        Raises TrainingError where the loss or the gradient is not finite: nothing of that step is saved.
        """
        batches = self.data.micro_batches(self.progress.step)
        local_targets = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
        [n_targets] = self.mesh.all_reduce([float(local_targets)])
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(batches):
            total += self.engine.forward_backward(batch, n_targets)
            if i + 1 < len(batches):
                self.engine.end_micro_batch()
        rate = learning_rate(self.config, self.progress.consumed_tokens)
        grad_norm = self.engine.step(rate)
        [loss] = self.mesh.all_reduce([float(total)])
        values = {"loss": loss / n_targets, "grad_norm": grad_norm, "lr": rate}
        if not all(torch.tensor(v).isfinite() for v in values.values()):
            raise TrainingError(f"step {self.progress.step + 1} is not finite: {values}")
        self.progress = Progress(
            self.progress.step + 1,
            self.progress.consumed_tokens + self.config.tokens_per_step,
            self.progress.optimizer_steps + 1,
        )
        return values

    def save(self) -> Path:
        """Write a checkpoint of where the run stands."""
        tokenizer = self.data.manifest.tokenizer
        record = {f: getattr(tokenizer, f) for f in ("name", "sha256", "vocab_size", "eos_id")}
        path = checkpoint.save(
            self.engine, self.mesh, self.config, self.progress, run_identity(self.config, self.data), record
        )
        if self.mesh.rank == 0:
            print(f"step {self.progress.step}  checkpoint {path}", flush=True)
        return path

    def _resume(self) -> Progress:
        # Rank 0 looks, and verifies hashes once: all ranks must resume from the same one.
        found: list[Any] = [None]
        if self.mesh.rank == 0:
            try:
                found = [checkpoint.newest(self.run_dir)]
            except checkpoint.CheckpointError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found, src=0)
        if isinstance(found[0], Exception):
            raise found[0]
        if found[0] is None:
            return Progress()
        progress = checkpoint.load(self.engine, self.mesh, found[0], run_identity(self.config, self.data))
        if self.mesh.rank == 0:
            print(f"resumed from {found[0]} at {progress.consumed_tokens:,} tokens", flush=True)
        return progress


def run_identity(config: Config, data: TrainingData) -> dict[str, Any]:
    """What decides a run's numbers but for the topology: a resumed run must share it."""
    values = config_to_dict(config)
    return {
        "model": values["model"],
        "optim": values["optim"],
        "data": {
            "train_sha256": data.manifest.idx_sha256 + data.manifest.bin_sha256,
            "seqlen": config.data.seqlen,
            "reset_at_eos": config.data.reset_at_eos,
        },
        "train": {key: values["train"][key] for key in ("total_tokens", "global_batch_size", "seed", "precision")},
    }


class ValidationLoss:
    """Mean loss over the first eval.tokens of the validation shard, in windows of the training context."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        read_manifest(config.data.valid, "data.valid", config.model.vocab_size)
        self.config, self.mesh = config, mesh
        self.stream = token_stream(config.data.valid)
        seqlen = config.data.seqlen
        self.count = (min(config.eval.tokens, len(self.stream) - 1)) // seqlen
        if self.count == 0:
            raise ConfigError(
                f"data.valid={config.data.valid} holds {len(self.stream)} tokens and eval.tokens={config.eval.tokens}: "
                f"no window of data.seqlen={seqlen} fits; set eval.interval=0 to train without validation"
            )

    def measure(self, engine: ZeroEngine) -> float:
        """Nats per token over the same windows whatever the number of ranks."""
        size, ranks = self.config.train.micro_batch_size, self.mesh.data_size
        total, scored = 0.0, 0.0
        with engine.evaluating() as model:
            # Every rank runs the same number of forwards, as ZeRO-3 gathers parameters in each: past the end, a
            # rank runs a window and scores nothing of it.
            for start in range(self.mesh.data_rank * size, self.count + (-self.count) % (size * ranks), size * ranks):
                rows = range(start, min(start + size, self.count))
                ids, targets = windows(self.stream, self.config.data.seqlen, rows or range(1))
                if not rows:
                    targets = torch.full_like(targets, IGNORED)
                total += float(model(ids.to(self.mesh.device), targets.to(self.mesh.device)))
                scored += float((targets != IGNORED).sum())
        total, scored = self.mesh.all_reduce([total, scored])
        return total / scored

"""What a run says while it trains: metrics.jsonl, a progress line, wandb. None of it may end the run."""

import errno
import os
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import torch

from data_tools.files import write_durably
from pretrain.checkpoint import SaveReport
from pretrain.config import Config, config_to_dict
from pretrain.data import ShardDocuments
from pretrain.evaluation.losses import perplexity
from pretrain.flops import flops_per_token
from pretrain.say import say

# Dense bf16 peaks, TFLOP/s per device, by the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
STRAGGLER = 1.2  # a rank this much slower than the median is named


def peak_tflops(configured: float | None) -> float | None:
    """Per device: what the config says, else by the GPU's name, else None (MFU is then n/a)."""
    if configured is not None or not torch.cuda.is_available():
        return configured
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class MetricsLog:
    """Rank 0's record of a run. Every step is a line of metrics.jsonl, flushed at once.

    (wandb's offline file loses up to 128 KiB on a SIGKILL.) Lines that a full disk refuses are kept and written when it
    takes them again; a wandb that fails is left alone for the rest of this start.
    """

    def __init__(self, config: Config, world_size: int, resumed_step: int) -> None:
        self.config, self.world_size = config, world_size
        self.flops_per_token = flops_per_token(config.model, config.data.seqlen)
        self.peak = peak_tflops(config.log.peak_tflops)
        self.run_dir = Path(config.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.file = _Lines(self.run_dir / "metrics.jsonl", resumed_step)
        self.skips = _Lines(self.run_dir / "skipped.jsonl", sys.maxsize)
        self.wandb = self._start_wandb()
        self._since, self._tokens, self._data_seconds = time.perf_counter(), 0, 0.0

    def _start_wandb(self) -> Any:
        if self.config.log.wandb == "disabled":
            return None
        import wandb  # takes a second, and most tests run without it

        try:
            return wandb.init(
                project="longhorn",
                name=self.run_dir.name,
                id=self._wandb_id(),
                resume="allow",
                dir=self.run_dir,
                mode=self.config.log.wandb,  # type: ignore[arg-type]  # checked by config.validate
                config=config_to_dict(self.config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # no network, no key, no room: its errors share no base class with OSError
            say(f"wandb did not start, training goes on without it: {error}", problem=True)
            return None

    def _wandb_id(self) -> str:
        """One id for all of a run's starts."""
        path = self.run_dir / "wandb_id"
        if not path.exists():
            write_durably(path, uuid.uuid4().hex[:8].encode())
        return path.read_text()

    def train_step(self, step: int, consumed_tokens: int, values: dict[str, Any]) -> None:
        """Record a step that ended at `step` and `consumed_tokens`; print a line every log.interval steps."""
        now = time.perf_counter()
        self._tokens += self.config.tokens_per_step
        self._data_seconds += values["data_seconds"]
        self._record({"step": step, "consumed_tokens": consumed_tokens, **values, "time": time.time()})
        if step % self.config.log.interval and step != self.config.total_steps:
            return
        speed = self._tokens / (now - self._since)
        mfu = None
        if self.peak is not None:
            mfu = speed * self.flops_per_token / (self.peak * 1e12 * self.world_size)
        say(self._progress_line(step, consumed_tokens, values, speed, mfu))
        share = self._data_seconds / (now - self._since)
        self._record({"step": step, "tokens_per_second": speed, "mfu": mfu, "data_share": share})
        self._since, self._tokens, self._data_seconds = now, 0, 0.0

    def _progress_line(
        self, step: int, consumed_tokens: int, values: dict[str, Any], speed: float, mfu: float | None
    ) -> str:
        remaining = (self.config.total_steps - step) * self.config.tokens_per_step / speed
        numbers = f"loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}"
        slowest = values["forward_seconds_max"] / max(values["forward_seconds_median"], 1e-9)
        straggler = f"  rank {values['slowest_rank']} {slowest:.2f}× slower" if slowest > STRAGGLER else ""
        return (
            f"step {step}/{self.config.total_steps}  tokens {consumed_tokens / 1e6:.2f}M  {numbers}  "
            f"{speed:,.0f} tokens/s  MFU {'n/a' if mfu is None else f'{mfu:.1%}'}  "
            f"ETA {timedelta(seconds=round(remaining))}{straggler}"
        )

    def skipped(self, step: int, reason: str, documents: list[ShardDocuments]) -> None:
        """A step that updated nothing, and the documents of its batch; RUN/skipped.jsonl outlives roll-backs."""
        names = [f"{found.shard} {number}" for found in documents for number in found.documents]
        say(f"step {step}  skipped: {reason}; documents {_shortened(names)}", problem=True)
        line = {"step": step, "reason": reason, "documents": documents, "time": time.time()}
        self.skips.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def checkpoint(self, step: int, report: SaveReport) -> None:
        """A save that was found complete at `step`, and what it cost."""
        say(
            f"step {step}  checkpoint {report.path}  {report.size / 1e6:,.1f} MB, training held "
            f"{report.held_seconds:.3f} s, written in {report.write_seconds:.2f} s",
        )
        costs = {"held_seconds": report.held_seconds, "write_seconds": report.write_seconds, "bytes": report.size}
        named = {f"checkpoint_{name}": value for name, value in costs.items()}
        self._record({"step": step, "checkpoint_step": report.step, **named})

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: the run went back to it."""
        self.file.close()
        self.file = _Lines(self.run_dir / "metrics.jsonl", step)
        self.resume_clock()

    def validation(self, step: int, losses: Mapping[int, float]) -> None:
        """Record validation losses, in nats per token by context; the time they took is not counted as training."""
        values = {"validation_loss": losses[self.config.data.seqlen]}
        line = f"step {step}  validation loss {values['validation_loss']:.4f}"
        for context in self.config.eval.contexts:
            values[f"validation_loss_at_{context}"] = losses[context]
            values[f"validation_perplexity_at_{context}"] = perplexity(losses[context])
            line += f"  at {context}: {losses[context]:.4f}"
        say(line)
        self._record({"step": step} | values)

    def resume_clock(self) -> None:
        """Start measuring speed anew, after something that is not training."""
        self._since, self._tokens, self._data_seconds = time.perf_counter(), 0, 0.0

    def _record(self, values: dict[str, Any]) -> None:
        self.file.append(orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE))
        if self.wandb is None:
            return
        try:
            self.wandb.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])
        except Exception as error:
            say(f"wandb failed, training goes on without it: {error}", problem=True)
            self.wandb = None

    def close(self) -> None:
        self.file.close()
        self.skips.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                say(f"wandb did not finish: {error}", problem=True)


class _Lines:
    """A file of whole lines, written at once; what a full disk refuses waits for the next line."""

    def __init__(self, path: Path, last_step: int) -> None:
        if path.exists():
            _drop_lines_after(path, last_step)
        self.path, self.file = path, path.open("ab", buffering=0)
        self.waiting: list[bytes] = []

    def append(self, line: bytes) -> None:
        refused_before = bool(self.waiting)
        self.waiting.append(line)
        try:
            while self.waiting:
                self._write(self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if not refused_before:
                say(f"{self.path}: {error.strerror}; lines are kept in memory", problem=True)

    def _write(self, line: bytes) -> None:
        """All of it, or nothing: half a line would break the next."""
        end = self.file.seek(0, os.SEEK_END)
        if self.file.write(line) != len(line):
            self.file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


def _shortened(names: list[str], most: int = 20) -> str:
    more = f", … {len(names) - most} more in skipped.jsonl" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget steps that a crash undid, and the half line that it may have left."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and orjson.loads(line)["step"] <= step:
                kept.append(line)
        except orjson.JSONDecodeError:
            continue
    write_durably(path, b"".join(kept))

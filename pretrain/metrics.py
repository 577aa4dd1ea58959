"""What a run says while it trains: metrics.jsonl, a progress line, wandb, status.json."""

import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import torch

from data_tools.files import write_durably
from pretrain.config import Config, config_to_dict
from pretrain.flops import flops_per_token

# Dense bf16 peaks, TFLOP/s per device, by the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


def peak_tflops(configured: float | None) -> float | None:
    """Per device: what the config says, else by the GPU's name, else None (MFU is then n/a)."""
    if configured is not None or not torch.cuda.is_available():
        return configured
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class MetricsLog:
    """Rank 0's record of a run. Every step is a line of metrics.jsonl, flushed at once.

    (wandb's offline file loses up to 128 KiB on a SIGKILL.)
    """

    def __init__(self, config: Config, world_size: int, resumed_step: int) -> None:
        self.config, self.world_size = config, world_size
        self.flops_per_token = flops_per_token(config.model)
        self.peak = peak_tflops(config.log.peak_tflops)
        self.run_dir = Path(config.run_dir)
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            _drop_lines_after(path, resumed_step)
        self.file = path.open("ab")
        self.wandb = self._start_wandb()
        self._since, self._tokens = time.perf_counter(), 0

    def _start_wandb(self) -> Any:
        if self.config.log.wandb == "disabled":
            return None
        import wandb  # takes a second, and most tests run without it

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

    def _wandb_id(self) -> str:
        """One id for all of a run's starts."""
        path = self.run_dir / "wandb_id"
        if not path.exists():
            write_durably(path, uuid.uuid4().hex[:8].encode())
        return path.read_text()

    def train_step(self, step: int, consumed_tokens: int, values: dict[str, float]) -> None:
        """Record a step that ended at `step` and `consumed_tokens`; print a line every log.interval steps."""
        now = time.perf_counter()
        self._tokens += self.config.tokens_per_step
        self._record({"step": step, "consumed_tokens": consumed_tokens, **values, "time": time.time()})
        if step % self.config.log.interval and step != self.config.total_steps:
            return
        speed = self._tokens / (now - self._since)
        mfu = None
        if self.peak is not None:
            mfu = speed * self.flops_per_token / (self.peak * 1e12 * self.world_size)
        remaining = (self.config.total_steps - step) * self.config.tokens_per_step / speed
        print(
            f"step {step}/{self.config.total_steps}  tokens {consumed_tokens / 1e6:.2f}M  "
            f"loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
            f"{speed:,.0f} tokens/s  MFU {'n/a' if mfu is None else f'{mfu:.1%}'}  "
            f"ETA {timedelta(seconds=round(remaining))}",
            flush=True,
        )
        self._record({"step": step, "tokens_per_second": speed, "mfu": mfu})
        self._since, self._tokens = now, 0

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss in nats per token; the time it took is not counted as training."""
        print(f"step {step}  validation loss {loss:.4f}", flush=True)
        self._record({"step": step, "validation_loss": loss})

    def resume_clock(self) -> None:
        """Start measuring speed anew, after something that is not training."""
        self._since, self._tokens = time.perf_counter(), 0

    def _record(self, values: dict[str, Any]) -> None:
        self.file.write(orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE))
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


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


def write_status(run_dir: Path, reason: str, step: int) -> None:
    """status.json: why the run last stopped ("done", "signal" or "error") and where."""
    write_durably(run_dir / "status.json", orjson.dumps({"reason": reason, "step": step, "time": time.time()}))

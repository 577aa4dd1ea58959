"""What `sbatch SCRIPT` will do with a planned run, and what is in its way.

All that can be known before a queue is waited for: the script's options, the shards, the disk, the run's directory.
"""

import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.dataset import is_dataset, open_dataset
from data_tools.shards import ShardError, ShardPaths
from pretrain.config import Config, ConfigError, validation_contexts
from pretrain.data import blend_weights, open_data
from pretrain.sbatch_script import SbatchScript
from pretrain.shard_reader import window_counts

if TYPE_CHECKING:
    from pretrain.plan import Plan

CHECKPOINT_BYTES_PER_SECOND = 1e9  # of a shared disk, for all ranks together: assumed
START_SECONDS = 300  # preflight, imports, the newest checkpoint: assumed
MARGIN_SECONDS = 60  # between the save that a signal asks for and the limit
DEFAULT_TRIES = 3  # MAX_TRIES of launch/train_job.sh
MAKE_SHARD = "python -m data_tools.tokenize --input 'DIR/*.jsonl.zst' --tokenizer mistral --output {} --workers 16"


@dataclass(frozen=True)
class Job:
    """A plan, the script that runs it, and what was given for it on the command line."""

    plan: "Plan"
    script: SbatchScript
    config_path: str
    overrides: tuple[str, ...]  # the config's: what the job gets as its arguments

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def step_seconds(self) -> float:
        return self.config.tokens_per_step / self.plan.tokens_per_second

    @property
    def save_seconds(self) -> float:
        return self.plan.checkpoint_bytes / CHECKPOINT_BYTES_PER_SECOND

    @property
    def done_steps(self) -> int:
        """Of the checkpoint that the job goes on from, 0 for a new run."""
        name = _text(self.run_dir / "latest").removeprefix("step_")
        return int(name) if name.isdecimal() else 0

    @property
    def hours_left(self) -> float:
        return (self.config.total_steps - self.done_steps) * self.step_seconds / 3600

    @property
    def allocations(self) -> int | None:
        """How many times the job starts, at the plan's speed; None where no limit is known, or it leaves no time."""
        limit, signal = self.script.time_limit, self.script.signal
        if limit is None or signal is None:
            return None
        useful = limit - signal.seconds - START_SECONDS
        return max(1, math.ceil(self.hours_left * 3600 / useful)) if useful > 0 else None

    def command(self) -> str:
        """What to type, in the repository's root."""
        words = ["sbatch"]
        for option, given, asked in (
            ("nodes", self.plan.options.nodes, self.script.nodes),
            ("gpus-per-node", self.plan.options.gpus_per_node, self.script.gpus_per_node),
        ):
            if given != asked:
                words.append(f"--{option}={given}")
        line = shlex.join([*words, str(self.script.path), *self.overrides])
        return line if self.script.config == self.config_path else f"CONFIG={shlex.quote(self.config_path)} {line}"


def job_run_dir(config_path: str, overrides: list[str]) -> str:
    """Where the job keeps the run: launch/train_job.sh does not read it in the config."""
    given = [o.partition("=")[2] for o in overrides if o.startswith("run_dir=")]
    return given[-1] if given else f"runs/{Path(config_path).stem}"


def script_problems(script: SbatchScript, config_path: str) -> Iterator[str]:
    """What the script lacks for a run that survives its time limit."""
    options = script.options
    if options.get("ntasks-per-node") != "1":
        yield "needs --ntasks-per-node=1: one torchrun a node starts that node's processes"
    if "requeue" not in options:
        yield "needs --requeue: without it a lost node or a preemption ends the run"
    if "time" not in options:
        yield "has no --time: the partition's default would end the job"
    for stream in ("output", "error"):
        # A pattern's directory, like logs/%j/, is not made by Slurm either.
        if stream in options and not (folder := Path(options[stream]).parent).is_dir():
            yield f"--{stream}={options[stream]}: no directory {folder}; Slurm would lose the log: mkdir -p {folder}"
    if script.config is None:
        yield "has no line CONFIG=${CONFIG:-launch/configs/….yaml}: what would it train?"
    elif Path(script.config) != Path(config_path) and os.environ.get("CONFIG") != config_path:
        yield (
            f"trains {script.config}, not {config_path}: name the script of that config, or set CONFIG={config_path} "
            "for this command and for sbatch"
        )


def signal_problems(job: Job) -> Iterator[str]:
    """Whether what is sent before the limit reaches the script in time for a step and a save."""
    signal, limit = job.script.signal, job.script.time_limit
    if signal is None or signal.name != "USR1" or not signal.to_batch_shell:
        yield "needs --signal=B:USR1@600: to the script alone, which passes it on"
        return
    needed = math.ceil(2 * job.step_seconds + job.save_seconds + MARGIN_SECONDS)
    if signal.seconds < needed:
        yield (
            f"--signal comes {signal.seconds} s before the limit; two steps of {job.step_seconds:.0f} s, a save of "
            f"{job.save_seconds:.0f} s and a margin take {needed} s: --signal=B:USR1@{needed}"
        )
    if limit is not None and limit <= signal.seconds + START_SECONDS:
        yield f"--time of {limit} s leaves no time to train: {START_SECONDS} s to start, {signal.seconds} s to stop"


def shard_problems(config: Config) -> Iterator[str]:
    """Missing, unfinished or another vocabulary's; a validation shard without one window."""
    used = {"data.train": config.data.train}
    if config.data.valid and config.eval.interval:
        used["data.valid"] = config.data.valid
    for key, prefix in used.items():
        if prefix and not is_dataset(prefix) and not ShardPaths.of(prefix).manifest.exists():
            yield f"{key}={prefix}: no such shard; make it: {MAKE_SHARD.format(prefix)}"
            continue
        try:
            dataset = open_data(prefix, key, config.model.vocab_size)
            if key == "data.train":
                blend_weights(config.data, window_counts(dataset, config.data.seqlen))
        except (ConfigError, ShardError) as error:
            yield str(error)
            continue
        longest = validation_contexts(config)[-1]
        if key == "data.valid" and dataset.tokens <= longest:
            name = "data.seqlen" if longest == config.data.seqlen else "eval.contexts"
            yield f"{key}={prefix} holds {dataset.tokens:,} tokens: no window of {name}={longest} fits"


def disk_problems(job: Job) -> Iterator[str]:
    needed, free = checkpoint_need(job), _free_bytes(job.run_dir) + _held_bytes(job.run_dir)
    if needed > free:
        yield (
            f"the checkpoints take up to {_gb(needed)}, the disk of {job.run_dir} has {_gb(free)} for them: make room, "
            "or lower checkpoint.keep_last, or raise checkpoint.keep_every"
        )


def run_problems(job: Job) -> Iterator[str]:
    if (job.run_dir / "DONE").exists():
        yield f"{job.run_dir} is done: the job would end at once; set another run_dir"
    if (job.run_dir / "STOP").exists():
        yield f"{job.run_dir}/STOP is there: the job would end at once; remove it to go on"


def checkpoint_need(job: Job) -> int:
    """Bytes of all that is kept at the run's end, and of the one being written."""
    keep, steps = job.config.checkpoint, job.config.total_steps
    count = keep.keep_last + 1 + int(keep.keep_best)
    if keep.keep_every:
        count += steps // math.lcm(keep.interval, keep.keep_every)
    return count * job.plan.checkpoint_bytes


def rows(job: Job) -> list[tuple[str, str]]:
    """What will happen, to print."""
    return [
        ("submit, from the repository's root", job.command()),
        ("asks for", f"{job.plan.options.nodes} nodes × {job.plan.options.gpus_per_node} GPUs"),
        ("goes on from", f"step {job.done_steps:,} of {job.config.total_steps:,}" if job.done_steps else "the start"),
        ("allocations", _allocations(job)),
        *_data_rows(job),
        ("checkpoints, at most", f"{_gb(checkpoint_need(job))}; {_gb(_free_bytes(job.run_dir))} free"),
        ("script's log", f"{job.script.options.get('output', 'slurm-%j.out')} (%x: job's name, %j: its number)"),
        ("logs of ranks and nodes", f"{job.run_dir}/logs/JOB.ATTEMPT/"),
        ("losses, and why it stopped", f"{job.run_dir}/metrics.jsonl, {job.run_dir}/status.json"),
        ("at the time limit", _at_the_limit(job)),
        ("after a crash, on a bad node", _after_a_crash(job)),
        ("at the end", f"{job.run_dir}/DONE, exit 0; later links of a chain end at once"),
    ]


def _allocations(job: Job) -> str:
    limit, count = job.script.time_limit, job.allocations
    if count is None:
        return f"{job.hours_left:,.1f} hours at the plan's MFU; no time limit to count by"
    assert limit is not None
    times = "no requeue" if count == 1 else f"{count - 1} requeues"
    return f"{count}: {job.hours_left:,.1f} hours at the plan's MFU, {limit / 3600:,.1f} hours each, {times}"


def _data_rows(job: Job) -> Iterator[tuple[str, str]]:
    data = job.config.data
    for key, prefix in {"data.train": data.train, "data.valid": data.valid}.items():
        try:
            tokens = open_dataset(prefix).tokens
        except ShardError:
            continue  # a problem, listed as such
        text = f"{tokens:,} tokens"
        if key == "data.train":
            epochs = job.plan.tokens / tokens
            text += f", the run takes {epochs:.2f} epochs" + (": tokens are seen again" if epochs > 1 else "")
        yield key, text


def _at_the_limit(job: Job) -> str:
    seconds = job.script.signal.seconds if job.script.signal else 0
    return f"{seconds} s before: saves (about {job.save_seconds:.0f} s), requeues itself, goes on from there"


def _after_a_crash(job: Job) -> str:
    interval = job.config.checkpoint.interval
    lost = interval * job.step_seconds / 60
    tries = os.environ.get("MAX_TRIES", DEFAULT_TRIES)
    return (
        f"requeued without the bad node; at most {interval} steps ({lost:,.0f} minutes) lost; "
        f"given up after {tries} attempts without a newer checkpoint"
    )


def _held_bytes(run_dir: Path) -> int:
    """Of checkpoints that are there: they give way to the ones to come."""
    files = (run_dir / "checkpoints").glob("step_*/*")
    return sum(file.stat().st_size for file in files)


def _free_bytes(path: Path) -> int:
    """On the disk where `path` is, or will be made."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"

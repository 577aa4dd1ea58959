"""Training speed of the models side by side: in one process, on the same tokens, a step each in turn."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch

from kernels.benchmarks.record import hardware_name, provenance, write_json
from kernels.benchmarks.timing import take_turns
from pretrain.benchmarks.step import TorchStep, random_batch
from pretrain.config import Config, config_to_dict

STEPS = 10  # timed, of each model


def measured_speeds(path: Path, configs: Mapping[str, Config], device: torch.device) -> dict[str, Any]:
    """The record at `path`; measured and written where there is none of these models under these conditions.

    The first config's micro-batch and threads are everybody's. All models are in memory at once.

    Returns:
        {"hardware_name", "device", "threads", "micro_batch_size", "context", "precision", "steps", "models": {name:
        {"model": its config, "tokens_per_second", "median_ms", "all_ms", …}}} and where and when
        (kernels/benchmarks/record.py).
    """
    models = {name: config_to_dict(config)["model"] for name, config in configs.items()}
    conditions = _conditions(next(iter(configs.values())), device)
    if path.exists():
        record = orjson.loads(path.read_bytes())
        known = {name: found["model"] for name, found in record["models"].items()}
        if known == models and conditions.items() <= record.items():
            return record
    made_by, threads = provenance(device), torch.get_num_threads()
    torch.set_num_threads(conditions["threads"])
    try:
        record = made_by | conditions | _measure(configs, device)
    finally:
        torch.set_num_threads(threads)
    for name, model in models.items():
        record["models"][name]["model"] = model
    write_json(path, record)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the trainings' now
    return record


def _conditions(first: Config, device: torch.device) -> dict[str, Any]:
    train = first.train
    return {
        "hardware_name": hardware_name(device),
        "device": device.type,
        "threads": train.threads or torch.get_num_threads(),
        "micro_batch_size": train.micro_batch_size,
        "context": first.data.seqlen,
        "precision": train.precision,
    }


def _measure(configs: Mapping[str, Config], device: torch.device) -> dict[str, Any]:
    first = next(iter(configs.values()))
    size, seqlen = first.train.micro_batch_size, first.data.seqlen
    batch = random_batch(first, size, device)
    runs = {name: partial(TorchStep(config, device), *batch) for name, config in configs.items()}
    times = take_turns(runs, STEPS, device)
    return {
        "steps": STEPS,
        "models": {
            name: {"tokens_per_second": size * seqlen / taken.median * 1e3, **taken.to_dict()}
            for name, taken in times.items()
        },
    }

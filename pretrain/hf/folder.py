"""Reading folders that transformers reads, as our models."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_tools.tokenizer import Tokenizer
from pretrain.checkpoint import LoadedModel, load_model
from pretrain.config import Config, ConfigError, config_from_dict
from pretrain.hf import ConversionError
from pretrain.hf.layouts import canonical

CONFIG, INDEX, WEIGHTS, PICKLED = (
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
TRAINING, TOKENIZER = "training.json", "tokenizer.model"  # of our exports
ORIGIN = "imported.json"  # of a run that began from such a folder


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a model as transformers writes it: a config and weights."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (INDEX, WEIGHTS, PICKLED))


def load_any(path: Path, device: torch.device) -> LoadedModel:
    """The model of a run's folder, a checkpoint's, or one that transformers reads.

    Raises CheckpointError or ConversionError where it is none of these, damaged, or a model that ours can't be.
    """
    return load_hf_folder(path, device) if is_hf_folder(path) else load_model(path, device)


def load_hf_folder(path: Path, device: torch.device) -> LoadedModel:
    """A folder of an export, or of transformers' own Mamba or LLaMA, as our model, its vocabulary padded with zeros.

    training.json gives the run's config, step and tokens where it is there, else they are the defaults and 0;
    tokenizer.model gives the tokenizer, else `tokenizer` is empty. Raises ConversionError.
    """
    from pretrain.hf.mapping import read_config  # transformers' models take seconds

    format, model_config = read_config(path)
    training = read_training(path)
    config = Config(model=model_config)
    if training is not None:
        try:
            config = config_from_dict(training["config"])
        except ConfigError as error:
            raise ConversionError(f"{path / TRAINING}: {error}") from error
        if canonical(config.model) != model_config:
            raise ConversionError(
                f"{path}: {TRAINING} and {CONFIG} describe different models: {config.model}, {model_config}"
            )
    training = training or {"step": 0, "consumed_tokens": 0}
    model = format.layout.read(read_weights(path), config.model, path)
    return LoadedModel(
        model.to(device), config, training["step"], training["consumed_tokens"], _tokenizer(path, training), path
    )


def read_training(folder: Path) -> dict[str, Any] | None:
    """training.json of an export, or None. Raises ConversionError for one that is damaged."""
    path = folder / TRAINING
    if not path.is_file():
        return None
    try:
        training = orjson.loads(path.read_bytes())
        if {"config", "step", "consumed_tokens"} - training.keys():
            raise ValueError("config, step or consumed_tokens is missing")
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path}: not what an export writes: {error}") from error
    return training


def _tokenizer(folder: Path, training: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / TOKENIZER
    if not path.is_file():
        return training.get("tokenizer") or {}
    found = asdict(Tokenizer.load(path).record)
    named = training.get("tokenizer") or found
    if named["sha256"] != found["sha256"]:
        raise ConversionError(f"{path}: its sha256 is {found['sha256']}, but {TRAINING} names {named['sha256']}")
    return named


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, in host memory: of model.safetensors or its parts, else of pytorch_model.bin.

    Raises ConversionError for a missing or damaged file, and for a pickle that holds more than tensors.
    """
    if (folder / INDEX).is_file():
        return _read_parts(folder)
    path = folder / WEIGHTS
    if path.is_file():
        return _read_safetensors(path)
    return read_pickled(folder / PICKLED)


def _read_parts(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX
    try:
        places: dict[str, str] = orjson.loads(path.read_bytes())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: not an index of weights: {error!r}") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ConversionError(f"{path}: {name!r} is not a file of this folder")
        found = _read_safetensors(folder / name)
        if missing := {tensor for tensor, place in places.items() if place == name} - found.keys():
            raise ConversionError(f"{folder / name}: {min(missing)} is missing, which {INDEX} says is there")
        weights |= found
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: {error}") from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """A state dict as torch.save writes it; nothing but tensors is unpickled."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no class for what it may refuse or find damaged
        raise ConversionError(f"{path}: can't be read as tensors alone: {error}".splitlines()[0]) from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ConversionError(f"{path}: holds something else than tensors by name")
    return weights

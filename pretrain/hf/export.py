"""Writing a model as a folder that transformers reads, under its name only once it was checked."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data_tools.files import sync
from data_tools.tokenizer import Tokenizer
from longhorn_layers.hf.tokenizer import write_tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import LoadedModel, read_manifest
from pretrain.config import config_to_dict
from pretrain.hf import ConversionError
from pretrain.hf.card import Written, card
from pretrain.hf.check import Differences, check_folder
from pretrain.hf.folder import ORIGIN, TOKENIZER, TRAINING
from pretrain.hf.mapping import Format, format_of, to_hf_model

TRAINING_FORMAT = 1


@dataclass(frozen=True)
class Export:
    """`parameters` without the vocabulary's padding; `differences` of the logits from the checkpoint's."""

    path: Path
    parameters: int
    differences: Differences


def export_to_hf(
    loaded: LoadedModel,
    tokenizer: Path,
    destination: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Export:
    """Write a checkpoint as a folder for transformers, check it, and only then give it its name.

    With bfloat16, the loaded model's own matrices are rounded too, and the check compares those: it is of the
    conversion, not of the rounding.

    Args:
        tokenizer: the SentencePiece file that the checkpoint was trained with.
        destination: a new folder; with `overwrite`, an earlier export may be there and is replaced.
        dtype: of the matrices; norms, biases of gates and rates stay fp32.

    Raises:
        ConversionError: something is at `destination`, transformers has no such model, or the written folder doesn't
            load or gives other token ids or logits.
        ValueError: a kind of tokenizer that transformers can't reproduce.
    """
    check_destination(destination, overwrite)
    model, format = loaded.model, format_of(loaded.config.model)
    training = training_record(loaded)
    _round(model, format, dtype)
    with _new_folder(destination) as folder:
        write_tokenizer(tokenizer, folder)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        exported = to_hf_model(model, theirs, dtype, loaded.config.data.seqlen)
        parameters = exported.num_parameters()
        _save(exported, format, folder)
        del exported  # the check's process needs the memory
        differences = check_folder(folder, model, Tokenizer.load(tokenizer), format.shipped)
        (folder / TRAINING).write_bytes(orjson.dumps(training, option=orjson.OPT_INDENT_2))
        written = Written(parameters, dtype, format.kept_fp32, format.shipped, differences)
        (folder / "README.md").write_text(card(loaded, training, destination.name, written), encoding="utf-8")
    return Export(destination, parameters, differences)


def training_record(loaded: LoadedModel) -> dict[str, Any]:
    """What training.json says of where the weights are from; `loaded.path` is RUN/checkpoints/step_…."""
    manifest, origin = read_manifest(loaded.path), loaded.path.parents[1] / ORIGIN
    return {
        "format_version": TRAINING_FORMAT,
        "step": loaded.step,
        "consumed_tokens": loaded.consumed_tokens,
        "config": config_to_dict(loaded.config),
        "tokenizer": loaded.tokenizer,
        "origin": orjson.loads(origin.read_bytes()) if origin.is_file() else None,
        "data_digest": manifest.identity.get("data", {}).get("train_digest"),
        "commit": manifest.commit,
        "versions": manifest.versions | {"transformers": version("transformers")},
    }


@torch.no_grad()
def _round(model: LanguageModel, format: Format, dtype: torch.dtype) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(format.file_dtype(format.layout.name(name), dtype)))


def _save(exported: PreTrainedModel, format: Format, folder: Path) -> None:
    if format.shipped:
        format.config_class.register_for_auto_class()
        format.model_class.register_for_auto_class("AutoModelForCausalLM")
    exported.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode  # as the umask has it
    for path in folder.glob("*.safetensors"):  # transformers leaves these to their owner alone
        path.chmod(mode)


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ConversionError where something is there that may not be replaced."""
    if not destination.exists():
        return
    if not overwrite:
        raise ConversionError(f"{destination} exists; --overwrite replaces an earlier export")
    if not (destination / TRAINING).is_file():
        raise ConversionError(f"{destination} is no earlier export (it has no {TRAINING}) and is left alone")


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder under a temporary name, which becomes `destination` if the block ends well and else goes away."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f".partial_{destination.name}")
    replaced = destination.with_name(f".replaced_{destination.name}")
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    folder.mkdir()
    try:
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync(path)
        if destination.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # left by a killed run too
            os.rename(destination, replaced)
        os.rename(folder, destination)
        sync(destination.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)

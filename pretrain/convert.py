"""Command: checkpoints to folders that transformers reads, and such folders to checkpoints that training goes on from.

    python -m pretrain.convert to-hf runs/125m exports/longhorn-125m --dtype bfloat16
    python -m pretrain.convert from-hf exports/longhorn-125m runs/continued --config launch/configs/125m.yaml
    python -m pretrain.convert from-official downloads/longhorn runs/theirs --tokenizer tokenizer.model

`to-hf` writes weights, the model's code where transformers has none, the tokenizer, training.json and a model card.
The folder appears only once another process has loaded it through transformers' Auto classes and got the same token
ids and logits from it, for texts of several lengths, in a batch padded on the left, and decoding step by step.

`from-hf` reads such a folder, or transformers' own Mamba or LLaMA; `from-official` the Longhorn authors' layout. Both
write RUN_DIR/checkpoints/step_00000000, from which `python -m pretrain.train CONFIG run_dir=RUN_DIR` goes on at any
tensor-parallel size, number of processes and ZeRO stage: with these weights, Adam's moments zero, and its data,
schedule and batch its own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from pretrain.checkpoint import CheckpointError, LoadedModel, check_new_run, load_model
from pretrain.config import Config, load_config
from pretrain.generate import tokenizer_file
from pretrain.hf.export import check_destination, export_to_hf
from pretrain.hf.folder import load_hf_folder
from pretrain.hf.importing import import_model
from pretrain.hf.official import load_official

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")


def to_hf(parsed: argparse.Namespace) -> str:
    """Write the folder; returns what to say of it."""
    check_destination(parsed.destination, parsed.overwrite)  # before a model is read
    loaded = load_model(parsed.source, CPU)
    tokenizer = tokenizer_file(loaded, parsed.tokenizer)
    export = export_to_hf(loaded, tokenizer, parsed.destination, dtype=DTYPES[parsed.dtype], overwrite=parsed.overwrite)
    found = export.differences
    return (
        f"{export.path}: {export.parameters:,} parameters, {parsed.dtype}; loaded by transformers, its logits differ "
        f"by at most {found.alone:.1e} of the largest ({found.padded:.1e} in a left-padded batch, {found.decoded:.1e} "
        "decoding step by step)"
    )


def from_hf(parsed: argparse.Namespace) -> str:
    """Write the checkpoint; returns what to say of it."""
    return _import(parsed, load_hf_folder)


def from_official(parsed: argparse.Namespace) -> str:
    """As `from_hf`, from the Longhorn authors' layout."""

    def load(source: Path, device: torch.device) -> LoadedModel:
        model = load_official(source).to(device)
        return LoadedModel(model, Config(model=model.config), 0, 0, {}, source)

    return _import(parsed, load)


def _import(parsed: argparse.Namespace, load: Callable[[Path, torch.device], LoadedModel]) -> str:
    check_new_run(parsed.destination)  # before a model is read
    config = load_config(parsed.config[0], parsed.config[1:]) if parsed.config else None
    loaded = load(parsed.source, CPU)
    folder = import_model(loaded, tokenizer_file(loaded, parsed.tokenizer), parsed.destination, config)
    model = loaded.model.config
    padding = model.padded_vocab_size - model.vocab_size
    padded = f"{padding} rows of vocabulary padding are zero, " if padding else ""
    train = f"python -m pretrain.train {' '.join(parsed.config or ['CONFIG'])} run_dir={parsed.destination}"
    return (
        f"{folder}: {sum(p.numel() for p in loaded.model.parameters()):,} parameters from {parsed.source} "
        f"at step 0; {padded}Adam's moments are zero. To go on: {train}"
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-hf", help="a checkpoint to a folder that transformers reads")
    source = "a run's folder (its newest checkpoint) or a checkpoint's"
    command.add_argument("source", type=Path, metavar="SRC", help=source)
    command.add_argument("destination", type=Path, metavar="DST", help="the folder to make")
    command.add_argument("--tokenizer", metavar="FILE", help="default: the training data's copy")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices: %(default)s")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    command.set_defaults(run=to_hf)
    for name, run, source in (
        ("from-hf", from_hf, "an export, or a folder of transformers' own Mamba or LLaMA"),
        ("from-official", from_official, "a folder with the authors' config.json and pytorch_model.bin"),
    ):
        command = commands.add_parser(name, help=f"{source} to a training checkpoint")
        command.add_argument("source", type=Path, metavar="SRC", help=source)
        command.add_argument("destination", type=Path, metavar="RUN_DIR", help="a new run's folder")
        config = "the config that training is to go on with; must be of the same model"
        command.add_argument("--config", nargs="+", metavar=("CONFIG", "key=value"), help=config)
        tokenizer = "the SentencePiece file of the model's tokens; default: the folder's tokenizer.model"
        command.add_argument("--tokenizer", metavar="FILE", help=tokenizer)
        command.set_defaults(run=run)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on stderr."""
    parsed = _arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(parsed.run(parsed))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

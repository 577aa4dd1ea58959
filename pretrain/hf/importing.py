"""From a model that was made elsewhere to a run's first checkpoint."""

from dataclasses import asdict, replace
from pathlib import Path

import orjson

from data_tools.files import write_durably
from data_tools.tokenizer import Tokenizer
from longhorn_layers.config import ModelConfig
from pretrain.checkpoint import LoadedModel, check_new_run, write_imported
from pretrain.config import Config, flattened
from pretrain.hf import ConversionError
from pretrain.hf.folder import ORIGIN, TOKENIZER
from pretrain.hf.layouts import canonical


def import_model(loaded: LoadedModel, tokenizer: Path, run_dir: Path, config: Config | None = None) -> Path:
    """Write RUN/checkpoints/step_00000000 with the model's weights; in RUN also the tokenizer, and where both are from.

    Args:
        loaded: the model, and what is known of its training; `path` is where it was found.
        tokenizer: the SentencePiece file of its tokens.
        config: of the run that is to go on; None: the one that `loaded` has.

    Raises ConversionError where `config` describes another model or the tokenizer has more pieces than the model, and
    CheckpointError where the run has checkpoints already.
    """
    config = replace(config or loaded.config, run_dir=str(run_dir))
    _check_model(config.model, loaded.config.model, loaded.path)
    found = Tokenizer.load(tokenizer)
    if found.vocab_size > config.model.vocab_size:
        raise ConversionError(
            f"{tokenizer} has {found.vocab_size} pieces, but {loaded.path} a vocabulary of {config.model.vocab_size}"
        )
    origin = {"source": str(loaded.path), "step": loaded.step, "consumed_tokens": loaded.consumed_tokens}
    check_new_run(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durably(run_dir / TOKENIZER, found.serialized)
    write_durably(run_dir / ORIGIN, orjson.dumps(origin, option=orjson.OPT_INDENT_2))
    # Last: with its checkpoint a run is imported, and can't be again.
    return write_imported(run_dir, loaded.model, config, loaded.tokenizer or asdict(found.record))


def _check_model(wanted: ModelConfig, found: ModelConfig, source: Path) -> None:
    """That a config is of the model that was found, however it writes it."""
    now, there = (flattened(asdict(canonical(model)), "model.") for model in (wanted, found))
    if differences := [
        f"{key} is {now.get(key)} in the config, {there.get(key)} there"
        for key in sorted(now.keys() | there.keys())
        if now.get(key) != there.get(key)
    ]:
        raise ConversionError(f"{source} is another model: {'; '.join(differences)}")

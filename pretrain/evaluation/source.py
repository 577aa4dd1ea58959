"""The model that is evaluated: which weights these are, where its results go, and whether the text is in its tokens."""

import hashlib
from pathlib import Path
from typing import Any

from data_tools.dataset import Dataset
from data_tools.files import sha256_file
from data_tools.tokenizer import Tokenizer
from pretrain.checkpoint import LoadedModel, step_name
from pretrain.checkpoint.format import MANIFEST
from pretrain.evaluation.losses import EvaluationError
from pretrain.hf.folder import CONFIG, PICKLED, TOKENIZER, is_hf_folder, read_training

FOLDER = "evaluation"
COMPARED_TOKENS = 20_000  # of the data, by which two tokenizers are compared


def results_folder(loaded: LoadedModel) -> Path:
    """evaluation/step_… in the checkpoint's run; evaluation in a folder for transformers."""
    if is_hf_folder(loaded.path):
        return loaded.path / FOLDER
    return loaded.path.parent.parent / FOLDER / step_name(loaded.step)


def fingerprint(folder: Path) -> str:
    """SHA-256 that changes with any weight: of a checkpoint's manifest, or of a folder's weights, config, tokenizer."""
    if not is_hf_folder(folder):
        return sha256_file(folder / MANIFEST)
    weights = sorted(folder.glob("*.safetensors")) or [folder / PICKLED]
    tokenizers = [path for name in (TOKENIZER, "tokenizer.json") if (path := folder / name).is_file()]
    return hashlib.sha256("".join(map(sha256_file, [folder / CONFIG, *weights, *tokenizers])).encode()).hexdigest()


def training_context(loaded: LoadedModel) -> int | None:
    """In tokens; None for a folder that doesn't say what its model was trained at."""
    if is_hf_folder(loaded.path) and read_training(loaded.path) is None:
        return None
    return loaded.config.data.seqlen


def provenance(loaded: LoadedModel) -> dict[str, Any]:
    """Which model it is."""
    return {
        "checkpoint": str(loaded.path),
        "fingerprint": fingerprint(loaded.path),
        "step": loaded.step,
        "consumed_tokens": loaded.consumed_tokens,
        "training_context": training_context(loaded),
        "tokenizer": loaded.tokenizer,
        "dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch."),
    }


def matching_tokenizer(loaded: LoadedModel, dataset: Dataset, sample: list[int]) -> Tokenizer:
    """The dataset's tokenizer, which must be the model's.

    Args:
        sample: ids of the dataset, whose text a folder that names no SentencePiece file has to give the same ids.

    Raises:
        EvaluationError: the model was trained with another one.
    """
    tokenizer = Tokenizer.load(dataset.tokenizer_path)
    if not loaded.tokenizer:
        _check_ids(loaded, dataset, tokenizer, sample)
        return tokenizer
    trained = loaded.tokenizer["sha256"]
    for path, found in ((dataset.path, dataset.tokenizer.sha256), (dataset.tokenizer_path, tokenizer.sha256)):
        if found != trained:
            raise EvaluationError(
                f"{path}: the tokenizer has sha256 {found}, but {loaded.path} was trained with "
                f"{loaded.tokenizer['name']}, {trained}; tokenize the text with that one"
            )
    return tokenizer


def _check_ids(loaded: LoadedModel, dataset: Dataset, tokenizer: Tokenizer, sample: list[int]) -> None:
    from transformers import PreTrainedTokenizerFast  # takes seconds

    folder = loaded.path
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder} has no tokenizer to compare with {dataset.path}'s: {error}") from error
    text, pieces = tokenizer.decode(sample), loaded.config.model.vocab_size
    if tokenizer.vocab_size > pieces:
        raise EvaluationError(f"{dataset.path} has ids up to {tokenizer.vocab_size - 1}, {folder} only {pieces} pieces")
    if theirs(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
        raise EvaluationError(
            f"{dataset.path}: its tokenizer gives other ids than {folder}'s for its own text; tokenize it with that one"
        )

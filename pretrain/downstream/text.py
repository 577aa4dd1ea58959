"""How a model reads text: its tokenizer, and the token that begins a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.tokenizer import Tokenizer
from pretrain.checkpoint import LoadedModel
from pretrain.evaluation.losses import EvaluationError
from pretrain.generate import tokenizer_file
from pretrain.hf.folder import TOKENIZER, is_hf_folder


@dataclass(frozen=True)
class TextCodec:
    """Texts to ids and back, nothing added; `prefix_id` is what the model has read where a text begins."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    prefix_id: int
    eos_id: int


def text_codec(loaded: LoadedModel) -> TextCodec:
    """The model's own: of its training data, or of its folder for transformers.

    Raises TokenizerError where it isn't there or is another one, EvaluationError where it has no EOS.
    """
    exported = is_hf_folder(loaded.path)
    if exported and not (loaded.path / TOKENIZER).is_file():
        return _of_transformers(loaded.path)
    tokenizer = Tokenizer.load(loaded.path / TOKENIZER if exported else tokenizer_file(loaded, None))
    return TextCodec(tokenizer.encode, tokenizer.decode, tokenizer.eos_id, tokenizer.eos_id)


def _of_transformers(folder: Path) -> TextCodec:
    """Of a model of others: its texts begin with what its tokenizer puts there by itself, or else with EOS."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if (eos_id := tokenizer.eos_token_id) is None:
        raise EvaluationError(f"{folder}: its tokenizer has no EOS, by which a text begins and ends")
    prefix_id = next(iter(tokenizer.encode("")), eos_id)
    return TextCodec(lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode, prefix_id, eos_id)

"""How many bytes of text tokens are: what makes losses of different tokenizers comparable."""

import numpy as np
from sentencepiece import SentencePieceProcessor

from data_tools.tokenizer import Tokenizer
from pretrain.evaluation.losses import TokenStream

COUNTED_TOKENS = 1 << 20  # whose bytes are counted at a time


def count_text_bytes(tokens: TokenStream, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that tokens[1:] stand for; tokens[0] only says what is before them.

    A byte piece is one byte, control pieces (EOS) are none, and others are what they spell, "▁" being a space; but the
    space that SentencePiece puts in front of a document is no part of its text. For a tokenizer that doesn't normalise,
    all documents together thus have the manifest's `text_bytes`; for one that does, the bytes of the normalised text.
    """
    pieces = range(tokenizer.vocab_size)
    sizes = np.array([_piece_bytes(tokenizer.processor, piece) for piece in pieces])
    spaced = np.array([tokenizer.processor.id_to_piece(piece).startswith("▁") for piece in pieces])
    prefixed = spaced[tokenizer.encode("a")[0]]  # whether the tokenizer puts that space
    total = 0
    for start in range(0, len(tokens) - 1, COUNTED_TOKENS):
        part = tokens[start : start + COUNTED_TOKENS + 1]
        total += int(sizes[part[1:]].sum())
        if prefixed:
            total -= int(np.count_nonzero(spaced[part[1:]] & (part[:-1] == tokenizer.eos_id)))
    return total


def _piece_bytes(processor: SentencePieceProcessor, piece: int) -> int:
    if processor.is_control(piece) or processor.is_unused(piece):
        return 0
    if processor.is_byte(piece):
        return 1
    if processor.is_unknown(piece):  # its text is lost; it decodes to a placeholder
        return len(processor.decode([piece]).encode())
    return len(processor.id_to_piece(piece).replace("▁", " ").encode())

"""Text to the bytes of a shard, several times as fast as SentencePiece and with the very same ids.

BPE merges two neighbours only where their concatenation is a piece. So the merges on two sides of a place that no piece
spans never meet, and the text can be cut there: before a run of spaces in a vocabulary without inner spaces (`▁the`,
never `of▁the`), and around characters that are part of no longer piece (a newline, most of CJK). What is between two
cuts is mostly a word, and text repeats its words: their ids are looked up. Models that this does not hold for are
encoded by SentencePiece as they are; the tests compare every id.
"""

import re
from array import array
from collections.abc import Iterator

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # generated

from data_tools.index import token_dtype
from data_tools.tokenizer import Tokenizer

SPACE = "▁"  # how SentencePiece writes a space
ANCHOR = "\n"
WORDS_HELD = 1 << 19  # some 100 MB
LONGEST_HELD = 48  # characters: longer ones seldom come again
SLICE = 1 << 20  # characters looked at together, so that a long document takes no more memory than its text


class Encoder:
    """Encodes texts to token ids as the little-endian bytes of a shard's `.bin`, without EOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._encode = tokenizer.processor.encode
        self._typecode = "H" if self.dtype.itemsize == 2 else "i"
        self.eos = self._packed([tokenizer.eos_id])
        self._units = _unit_pattern(tokenizer.serialized)
        self._known = _Words(self)
        self._anchor_ids = len(self._encode(ANCHOR))

    @property
    def exact_cuts(self) -> bool:
        """Whether the model is one that texts can be cut for; if not, each is encoded whole."""
        return self._units is not None

    def encode(self, text: str) -> bytes:
        """Ids of a text, the same as `Tokenizer.encode` gives.

        Where more than `SLICE` characters come without a place to cut (no space, no newline), they are cut all the
        same, and the ids at such a cut may differ from the whole's.
        """
        if self._units is None:
            return self._packed(self._encode(text))
        if len(text) >= SLICE:
            return b"".join(self.slices(text))
        # SentencePiece puts a space before a text, too.
        return b"".join(map(self._known.__getitem__, self._units.findall(" " + text))) if text else b""

    def slices(self, text: str) -> Iterator[bytes]:
        """The parts of `encode(text)`, for texts too long to hold their ids as well."""
        if self._units is None:
            yield self._packed(self._encode(text))
            return
        lookup, findall = self._known.__getitem__, self._units.findall
        rest, position = " " if text else "", 0
        while position < len(text):
            units = findall(rest + text[position : position + SLICE])
            position += SLICE
            # The last may go on in the next slice, unless it is too long to wait for its end.
            rest = units.pop() if position < len(text) and len(units[-1]) < SLICE else ""
            yield b"".join(map(lookup, units))
        if rest:
            yield lookup(rest)

    def unit(self, unit: str) -> bytes:
        """Ids of what lies between two cuts, with the spaces before it."""
        # Behind the anchor, which merges with nothing, as a text's first character gets a space before it.
        return self._packed(self._encode(ANCHOR + unit)[self._anchor_ids :])

    def _packed(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()


class _Words(dict[str, bytes]):
    """Units seen before; emptied when full, since what comes next is more like what came last."""

    def __init__(self, encoder: Encoder) -> None:
        self._unit = encoder.unit

    def __missing__(self, unit: str) -> bytes:
        ids = self._unit(unit)
        if len(unit) <= LONGEST_HELD:
            if len(self) >= WORDS_HELD:
                self.clear()
            self[unit] = ids
        return ids


def _unit_pattern(serialized: bytes) -> re.Pattern[str] | None:
    """What to cut a text into, None where cuts would change ids.

    A unit is a run of spaces with a run of characters that occur in pieces of more than one; spaces alone; or one
    other character.
    """
    model = ModelProto()
    model.ParseFromString(serialized)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain_text = (
        normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not normalizer.precompiled_charsmap
        and not trainer.treat_whitespace_as_suffix
    )
    # Without byte fallback neighbouring unknown characters become one unknown token, across any cut.
    if not plain_text or not trainer.byte_fallback or trainer.model_type != trainer.BPE:
        return None
    special = (ModelProto.SentencePiece.CONTROL, ModelProto.SentencePiece.UNKNOWN, ModelProto.SentencePiece.BYTE)
    longer = [piece.piece for piece in model.pieces if piece.type not in special and len(piece.piece) > 1]
    merging = set("".join(longer)) - {SPACE}
    if ANCHOR in merging or any(SPACE in piece.lstrip(SPACE) for piece in longer):
        return None
    merges = f"[{re.escape(''.join(sorted(merging)))}]"
    return re.compile(f"[ {SPACE}]*{merges}+|[ {SPACE}]+|.", re.DOTALL)

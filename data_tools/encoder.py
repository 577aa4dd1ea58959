"""Text to the bytes of a shard, several times as fast as SentencePiece and with the very same ids.

BPE merges two neighbours only where their concatenation is a piece. So the merges on two sides of a place that no piece
spans never meet, and the text can be cut there: before a run of spaces in a vocabulary without inner spaces (`▁the`,
never `of▁the`), and around characters that are part of no longer piece (a newline, most of CJK). What is between two
cuts is mostly a word, and text repeats its words: their ids are looked up. Models that this does not hold for are
encoded by SentencePiece as they are; the tests compare every id.
"""

import re
from collections.abc import Iterator

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # generated

from data_tools.index import token_dtype
from data_tools.tokenizer import Tokenizer

SPACE = "▁"  # how SentencePiece writes a space
ANCHOR = "\n"
WORDS_HELD = 1 << 19  # some 100 MB
LONGEST_HELD = 48  # characters: longer ones seldom come again
SLICE = 1 << 20  # characters looked at together, so that a long document takes no more memory than its text
LEARNED_AT_ONCE = 1 << 12  # units


class Encoder:
    """Encodes texts to token ids as the little-endian bytes of a shard's `.bin`, without EOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._encode = tokenizer.processor.encode
        self.eos = self._packed([tokenizer.eos_id])
        self._units = _unit_pattern(tokenizer.serialized)
        # SentencePiece puts a space before a text, which is then a token of its own.
        self._anchor_id = self._encode(ANCHOR)[-1]
        self._known = {ANCHOR: self._packed([self._anchor_id])}

    @property
    def exact_cuts(self) -> bool:
        """Whether the model is one that texts can be cut for; if not, each is encoded whole."""
        return self._units is not None

    def encode(self, text: str) -> bytes:
        """Ids of a text, the same as `Tokenizer.encode` gives.

        Where more than `SLICE` characters come without a place to cut (no space, no newline), they are cut all the
        same, and the ids at such a cut may differ from the whole's.
        """
        return b"".join(self.slices(text))

    def slices(self, text: str) -> Iterator[bytes]:
        """The parts of `encode(text)`, for texts too long to hold their ids as well."""
        if self._units is None:
            yield self._packed(self._encode(text))
            return
        rest, position = " " if text else "", 0
        while position < len(text):
            units = self._units.findall(rest + text[position : position + SLICE])
            position += SLICE
            # The last may go on in the next slice, unless it is too long to wait for its end.
            rest = units.pop() if position < len(text) and len(units[-1]) < SLICE else ""
            yield self._joined(units)
        if rest:
            yield self._joined([rest])

    def _joined(self, units: list[str]) -> bytes:
        unknown = set(units).difference(self._known)
        if len(self._known) + len(unknown) > WORDS_HELD:
            # What comes next is more like what came last.
            self._known = {ANCHOR: self._known[ANCHOR]}
            unknown = set(units) - {ANCHOR}
        learned = sorted(unknown)
        for start in range(0, len(learned), LEARNED_AT_ONCE):
            self._learn(learned[start : start + LEARNED_AT_ONCE])
        ids = b"".join(map(self._known.__getitem__, units))
        for unit in learned:
            if len(unit) > LONGEST_HELD:
                del self._known[unit]
        return ids

    def _learn(self, units: list[str]) -> None:
        """Encode units in one call, between anchors: these merge with nothing, and no unit holds one."""
        ids = np.array(self._encode(ANCHOR + ANCHOR.join(units)), self.dtype)
        size, content = self.dtype.itemsize, ids.tobytes()
        starts = np.flatnonzero(ids == self._anchor_id).tolist()
        for unit, start, end in zip(units, starts, [*starts[1:], len(ids)], strict=True):
            self._known[unit] = content[(start + 1) * size : end * size]

    def _packed(self, ids: list[int]) -> bytes:
        return np.array(ids, self.dtype).tobytes()


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

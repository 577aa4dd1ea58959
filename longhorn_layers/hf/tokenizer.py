"""Writes a SentencePiece BPE model as the tokenizer files of a Hugging Face export."""

import json
import os
import re
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"  # U+2581, how SentencePiece writes a space
Piece = ModelProto.SentencePiece


def write_tokenizer(spm_path: Path, out_dir: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json for AutoTokenizer.

    The ids are those of the SentencePiece model, which are those of the training shards: nothing is
    added in front or behind (shards have no BOS, and an EOS only after each document), and a text
    that spells a special token, such as "</s>", is tokenized as the text it is. Use the tokenizer's
    `eos_token_id` to mark an end. Its `bos_token` is the EOS too, as in GPT-2: in training that is what a text
    begins after; `add_bos_token=True` puts it there. Where the model has no padding piece, padding is the unknown
    piece, which byte fallback leaves without another use; the padding side is left, for generation.

    spm_path: a BPE model with byte fallback and the identity normaliser (LLaMA's and Mistral's
    kind), with or without a dummy prefix and user-defined symbols. out_dir: created if missing.
    Each file is replaced whole or not at all.

    Raises ValueError, naming the file and what it would have to be, for any other kind of model.
    """
    model = _read(spm_path)
    specials = _special_tokens(model)
    tokenizer = _build(model, sorted({*specials.values(), *_control_pieces(model)}))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    _replace(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    _replace(out_dir / "tokenizer_config.json", json.dumps(settings | specials, indent=2))
    _replace(out_dir / "special_tokens_map.json", json.dumps(specials, indent=2))


def _read(path: Path) -> ModelProto:
    """Parses the model, refusing what tokenizer.json could not do exactly."""
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is no public name
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type)
    unsupported = {
        f"model_type is {kind}, must be BPE": trainer.model_type != trainer.BPE,
        "byte_fallback is off, must be on": not trainer.byte_fallback,
        "treat_whitespace_as_suffix is on, must be off": trainer.treat_whitespace_as_suffix,
        f"normalization_rule_name is {normalizer.name}, must be identity": bool(
            normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        ),
        "remove_extra_whitespaces is on, must be off": normalizer.remove_extra_whitespaces,
        "escape_whitespaces is off, must be on": not normalizer.escape_whitespaces,
        "it has pieces marked unused, must have none": any(piece.type == Piece.UNUSED for piece in model.pieces),
    }
    faults = [fault for fault, present in unsupported.items() if present]
    if not model.pieces:
        faults = ["it has no pieces"]
    if faults:
        raise ValueError(f"{path}: cannot be exported: {'; '.join(faults)}")
    return model


def _special_tokens(model: ModelProto) -> dict[str, str]:
    trainer = model.trainer_spec
    # What stands before a text in training is the EOS of the one before it; <s> is never trained, and a bad beginning.
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.eos_id, "eos_token": trainer.eos_id}
    ids["pad_token"] = trainer.pad_id if trainer.pad_id >= 0 else trainer.unk_id
    return {name: model.pieces[index].piece for name, index in ids.items() if index >= 0}


def _control_pieces(model: ModelProto) -> list[str]:
    """Pieces that no text becomes, like <s>: decoding leaves them out."""
    return [piece.piece for piece in model.pieces if piece.type == Piece.CONTROL]


def _build(model: ModelProto, specials: list[str]) -> Tokenizer:
    symbols = [piece.piece for piece in model.pieces if piece.type == Piece.USER_DEFINED]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(model.pieces)},
            merges=_merges(model),
            unk_token=model.pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=bool(symbols),  # no merge makes a symbol: it is looked up whole
        )
    )
    dummy_prefix = model.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * dummy_prefix + [normalizers.Replace(" ", SPACE)]
    )
    if symbols:  # SentencePiece cuts them out first, the longest where several match
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * dummy_prefix
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    return tokenizer


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first.

    SentencePiece merges the neighbours that make the best piece; tokenizer.json wants ranked pairs.
    """
    ids = {p.piece: index for index, p in enumerate(model.pieces) if p.type == Piece.NORMAL}
    ranked = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                rank = (-model.pieces[index].score, index, ids[left], ids[right])
                ranked.append((rank, (left, right)))
    return [pair for _, pair in sorted(ranked)]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

"""A written folder against the model that it was made from, through what a user of it does (user.py)."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_tools.tokenizer import Tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.hf import ConversionError

USER, TEXT = Path(__file__).with_name("user.py"), Path(__file__).with_name("text.txt")  # prose, spaces, code
LENGTHS = (1, 7, 128, 384)  # tokens: below a convolution's width, no multiple of a chunk, and several chunks
STEPS = 24  # decoded one by one after each
TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Differences:
    """Of logits, in parts of the largest: each text by itself, in a batch padded on the left, decoded step by step."""

    alone: float
    padded: float
    decoded: float

    @property
    def largest(self) -> float:
        return max(self.alone, self.padded, self.decoded)


@torch.inference_mode()
def check_folder(folder: Path, model: LanguageModel, tokenizer: Tokenizer, code: bool) -> Differences:
    """How far the logits of the folder, loaded anew in fp32 by another process, are from the model's.

    On the beginnings of text.txt. `code`: whether the folder may run its own code; else transformers' must do.

    Raises ConversionError where the folder doesn't load, its token ids are others, or a difference is above 1e-4 of
    the largest logit, or NaN.
    """
    found = _load_elsewhere(folder, code)
    ids = torch.tensor(tokenizer.encode(TEXT.read_bytes().decode()))
    if not torch.equal(found["ids"], ids):
        raise ConversionError("the written tokenizer gives other ids than SentencePiece")
    rows = [ids[:length] for length in LENGTHS]
    differences = {
        "alone": [_difference(found[f"alone.{i}"], _logits(model, row)) for i, row in enumerate(rows)],
        "padded": [_difference(found["padded"][i, -len(row) :], _logits(model, row)) for i, row in enumerate(rows)],
        "decoded": [_step_difference(found, model, i, row) for i, row in enumerate(rows)],
    }
    for way, values in differences.items():
        for row, value in zip(rows, values, strict=True):
            if not value <= TOLERANCE:  # so that NaN is refused
                raise ConversionError(
                    f"the written model's logits ({way}, {len(row)} tokens) differ by {value:.1e} of the largest from "
                    f"the checkpoint's (at most {TOLERANCE:.0e} may be rounding)"
                )
    return Differences(**{way: max(values) for way, values in differences.items()})


def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    device = model.embedding.weight.device
    return model(ids[None].to(device))[0, :, : model.config.vocab_size].cpu()


def _step_difference(found: dict[str, Tensor], model: LanguageModel, row: int, prompt: Tensor) -> float:
    generated, steps = found["generated"][row], found["steps"][row]
    return _difference(steps, _logits(model, torch.cat([prompt, generated[:-1]]))[-len(steps) :])


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        shapes = tuple(found.shape), tuple(expected.shape)
        raise ConversionError("the written model's logits are {}, not {}".format(*shapes))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _load_elsewhere(folder: Path, code: bool) -> dict[str, Tensor]:
    """What user.py finds in a process of its own: offline, with an empty cache, without this repository."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.safetensors")
        lengths = ",".join(map(str, LENGTHS))
        arguments = [folder.resolve(), "code" if code else "no-code", TEXT, lengths, STEPS, result]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.run(
            [sys.executable, "-P", str(USER), *map(str, arguments)],
            cwd=scratch,
            env=environment | {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise ConversionError(f"the written folder does not load:\n{process.stderr.strip()}")
        return load_file(result)

"""Command: write a checkpoint as a Hugging Face folder that loads without this repository.

    python -m pretrain.convert to-hf runs/125m exports/longhorn-125m --dtype bfloat16

The folder holds the weights, the model's code, the tokenizer and a model card. It appears only once
another process has loaded it through transformers' Auto classes and got the same token ids and
logits from it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_tools.files import sync
from data_tools.tokenizer import Tokenizer
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.hf.configuration_longhorn import LonghornConfig as ExportConfig
from longhorn_layers.hf.modeling_longhorn import LonghornForCausalLM
from longhorn_layers.hf.tokenizer import write_tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import CheckpointError, LoadedModel, load_model
from pretrain.generate import tokenizer_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKED_TOKENS = 384
TOLERANCE = 1e-4  # of the largest logit

# What a user does, in a process that does not run in this repository.
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, tokens, result = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with open(text, encoding="utf-8", newline="") as file:
    ids = torch.tensor(tokenizer(file.read())["input_ids"][: int(tokens)])
with torch.inference_mode():
    logits = model(ids[None]).logits[0]
save_file({"ids": ids, "logits": logits}, result)
"""

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [longhorn, state-space-model]
---
# {name}

A Longhorn state-space language model ([arXiv 2407.14207](https://arxiv.org/abs/2407.14207)):
{parameters:,} parameters, {layers} layers of width {width}, trained on {consumed_tokens:,} tokens
({step:,} steps) at a context of {context:,} tokens. Its state does not grow with the text, so that
longer ones cost no more per token.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The state of the Union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

`trust_remote_code` is needed because the model's code is in this folder, not in transformers (5.17
or newer).

- Weights: {dtype}; norms, `D` and `dt_bias` in float32. The state is always float32.
- Tokenizer: {tokenizer}, {vocab_size:,} pieces, sha256 `{sha256}`.
  Nothing is added around a text; in training, the end-of-sequence token stood after each document.
- When it was written, this folder's logits in float32 differed by at most {difference:.1e} of the
  largest from those of the code that trained it, over {checked} tokens.
"""


class ConversionError(ValueError):
    """The folder can't be written, or isn't the model that it was made from; nothing is left at its
    place.
    """


@dataclass(frozen=True)
class Export:
    """`parameters` without the vocabulary's padding; `difference` of the logits, relative to the
    largest.
    """

    path: Path
    parameters: int
    difference: float


def export_to_hf(
    loaded: LoadedModel,
    tokenizer: Path,
    destination: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Export:
    """Write a folder for transformers, check it, and only then give it its name.

    With bfloat16, the loaded model's own matrices are rounded too, and the check compares those: it
    is of the conversion, not of the rounding.

    Args:
        tokenizer: the SentencePiece file that the checkpoint was trained with.
        destination: a new folder; with `overwrite`, an earlier export may be there and is replaced.
        dtype: of the matrices; norms, D and dt_bias stay fp32.

    Raises:
        ConversionError: something is at `destination`, the mixer has no code for transformers, or
            the written folder doesn't load or gives other token ids or logits.
        ValueError: a kind of tokenizer that transformers can't reproduce.
    """
    _check_destination(destination, overwrite)
    model = loaded.model
    _round(model, dtype)
    with _new_folder(destination) as folder:
        write_tokenizer(tokenizer, folder)
        exported = to_hf_model(model, PreTrainedTokenizerFast.from_pretrained(folder), dtype)
        parameters = exported.num_parameters()
        _save(exported, folder)
        del exported  # the check's process needs the memory
        difference = check_folder(folder, model, Tokenizer.load(tokenizer))
        card = _card(loaded, destination.name, parameters, dtype, difference)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(destination, parameters, difference)


def hf_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> ExportConfig:
    """The config of the shipped code. Raises ConversionError for a mixer that it doesn't know."""
    mixer = config.mixer
    if not isinstance(mixer, LonghornConfig):
        raise ConversionError(f"model.mixer.name: {mixer.name!r} has no code for transformers; 'longhorn' has")
    return ExportConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layer,
        state_size=mixer.d_state,
        conv_kernel=mixer.d_conv,
        expand=mixer.expand,
        time_step_rank=mixer.resolved_dt_rank(config.d_model),
        norm_eps=config.norm_eps,
        update_rule=mixer.update,  # type: ignore[arg-type]  # it checks the value itself
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def hf_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under the shipped code's names, fp32, without the vocabulary's padding rows."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name in ("embedding.weight", "head.weight"):
            weight = weight[: model.config.vocab_size].clone()
        weights["lm_head.weight" if name == "head.weight" else f"model.{name}"] = weight
    return weights


def to_hf_model(model: LanguageModel, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> LonghornForCausalLM:
    """The same model in the shipped code's classes, on the model's device."""
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        exported = LonghornForCausalLM(hf_config(model.config, tokenizer))
    weights = {name: weight.to(_file_dtype(name, dtype)) for name, weight in hf_weights(model).items()}
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    return exported.eval()


def _file_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    kept = LonghornForCausalLM._keep_in_fp32_modules_strict
    return torch.float32 if any(part in name for part in kept) else dtype


@torch.no_grad()
def _round(model: LanguageModel, dtype: torch.dtype) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(weight.to(_file_dtype(name, dtype)))


def _save(exported: LonghornForCausalLM, folder: Path) -> None:
    ExportConfig.register_for_auto_class()
    LonghornForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    exported.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode  # as the umask has it
    for path in folder.glob("*.safetensors"):  # transformers leaves these to their owner alone
        path.chmod(mode)


# ---- the check ---------------------------------------------------------------------------------


@torch.inference_mode()
def check_folder(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> float:
    """How far the logits of the folder, loaded anew, are from the model's: max |Δ| / max |logit|.

    On the first tokens of a text that every export has: its own code. Raises ConversionError where
    the folder doesn't load, its token ids are others, or the difference is above 1e-4 or NaN.
    """
    text = folder / "modeling_longhorn.py"
    found = _load_elsewhere(folder, text)
    ids = torch.tensor(tokenizer.encode(text.read_bytes().decode())[:CHECKED_TOKENS])
    if not torch.equal(found["ids"], ids):
        raise ConversionError("the written tokenizer gives other ids than SentencePiece")
    expected = model(ids[None].to(model.embedding.weight.device))[0, :, : model.config.vocab_size].cpu()
    if found["logits"].shape != expected.shape:
        shapes = tuple(found["logits"].shape), tuple(expected.shape)
        raise ConversionError("the written model's logits are {}, not {}".format(*shapes))
    difference = ((found["logits"] - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:  # so that NaN is refused
        raise ConversionError(
            f"the written model's logits differ by {difference:.1e} of the largest from the "
            f"checkpoint's (at most {TOLERANCE:.0e} may be rounding)"
        )
    return difference


def _load_elsewhere(folder: Path, text: Path) -> dict[str, Tensor]:
    """`ids` and `logits` of a text's first tokens by a process of its own, offline and with an
    empty cache.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.safetensors")
        arguments = [str(folder.resolve()), str(text.resolve()), str(CHECKED_TOKENS), str(result)]
        process = subprocess.run(
            [sys.executable, "-c", LOAD, *arguments],
            cwd=scratch,
            env=os.environ | {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise ConversionError(f"the written folder does not load:\n{process.stderr.strip()}")
        return load_file(result)


# ---- the folder --------------------------------------------------------------------------------


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not overwrite:
        raise ConversionError(f"{destination} exists; --overwrite replaces an earlier export")
    if not (destination / "config.json").is_file():
        raise ConversionError(f"{destination} is no earlier export (it has no config.json) and is left alone")


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder under a temporary name, which becomes `destination` if the block ends well and else
    goes away.
    """
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
            os.rename(destination, replaced)
        os.rename(folder, destination)
        sync(destination.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _card(loaded: LoadedModel, name: str, parameters: int, dtype: torch.dtype, difference: float) -> str:
    return CARD.format(
        name=name,
        parameters=parameters,
        layers=loaded.config.model.n_layer,
        width=loaded.config.model.d_model,
        consumed_tokens=loaded.consumed_tokens,
        step=loaded.step,
        context=loaded.config.data.seqlen,
        dtype=str(dtype).removeprefix("torch."),
        tokenizer=loaded.tokenizer["name"],
        vocab_size=loaded.tokenizer["vocab_size"],
        sha256=loaded.tokenizer["sha256"],
        difference=difference,
        checked=CHECKED_TOKENS,
    )


# ---- the command -------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face folder")
    to_hf.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a run's folder (its newest checkpoint) or a checkpoint's",
    )
    to_hf.add_argument("destination", type=Path, metavar="DST", help="the folder to make")
    to_hf.add_argument("--tokenizer", metavar="FILE", help="default: the training shard's copy")
    to_hf.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices: %(default)s")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on stderr."""
    parsed = _arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _check_destination(parsed.destination, parsed.overwrite)  # before a model is read
        loaded = load_model(parsed.source, torch.device("cpu"))
        tokenizer = tokenizer_file(loaded, parsed.tokenizer)
        export = export_to_hf(
            loaded,
            tokenizer,
            parsed.destination,
            dtype=DTYPES[parsed.dtype],
            overwrite=parsed.overwrite,
        )
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{export.path}: {export.parameters:,} parameters, {parsed.dtype}; loaded by transformers, "
        f"its logits differ by at most {export.difference:.1e} of the largest"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

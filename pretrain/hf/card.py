"""The model card of an export: what the model is, what it was trained on and how, how well it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from omegaconf import OmegaConf

from pretrain.checkpoint import LoadedModel
from pretrain.evaluation.report import RESULT, Report, number
from pretrain.hf.check import LENGTHS, STEPS, Differences

CONSTANT = "Its state does not grow with the text, so that longer ones cost no more per token."
CHUNKS = "transformers' Mamba begins anew when it is given several tokens after others: give it a prompt in one call."
KINDS = {  # mixer → name, paper, what a user should know
    "longhorn": ("Longhorn state-space", "2407.14207", CONSTANT),
    "mamba": ("Mamba state-space", "2312.00752", f"{CONSTANT} {CHUNKS}"),
    "gla": ("gated linear attention", "2312.06635", CONSTANT),
    "attention": ("LLaMA", "2302.13971", "It was not trained on longer contexts than that."),
}
CODE = """\
`trust_remote_code` is needed because the model's code is in this folder, not in transformers (5.17 or newer). What a
text leaves behind is a state of constant size. To go on from it, pass it as `cache_params` with the new tokens alone,
also where `generate` returned it as `past_key_values`. `guidance_scale` needs `use_cache=False`."""
NO_CODE = "The model's code is in transformers (5.17 or newer)."

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{mixer}]
---
# {name}

A {kind} language model ([arXiv {paper}](https://arxiv.org/abs/{paper})): {parameters:,} parameters,
{layers} layers of width {width}, trained on {consumed_tokens:,} tokens ({step:,} steps) at a context of
{context:,} tokens. {note}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder{trust})
inputs = tokenizer("The state of the Union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

{code}

- Weights: {dtype}; in float32: {fp32}.
- Tokenizer: {tokenizer}, {vocab_size:,} pieces, sha256 `{sha256}`.
  Nothing is added around a text; in training, the end-of-sequence token stood after each document.
- Data: {data}.{origin}
- When it was written, this folder was loaded by transformers alone: in float32 its logits on real text differed by at
  most {alone:.1e} of the largest from those of the code that trained it (texts of {lengths} tokens), {padded:.1e} in a
  batch padded on the left, {decoded:.1e} over {steps} tokens decoded one by one.

## Evaluation

{evaluation}

## The run's config

Code: commit `{commit}`.

```yaml
{config}```
"""


@dataclass(frozen=True)
class Written:
    """What is said of the files: `parameters` without the vocabulary's padding, `fp32` whatever `dtype` is."""

    parameters: int
    dtype: torch.dtype
    fp32: tuple[str, ...]
    code: bool
    differences: Differences


def card(loaded: LoadedModel, training: dict[str, Any], name: str, written: Written) -> str:
    """README.md of an export; `training` is what its training.json holds."""
    config, tokenizer = loaded.config, loaded.tokenizer
    kind, paper, note = KINDS[config.model.mixer.name]
    return CARD.format(
        mixer=config.model.mixer.name,
        name=name,
        kind=kind,
        paper=paper,
        note=note,
        parameters=written.parameters,
        layers=config.model.n_layer,
        width=config.model.d_model,
        consumed_tokens=loaded.consumed_tokens,
        step=loaded.step,
        context=config.data.seqlen,
        trust=", trust_remote_code=True" if written.code else "",
        code=CODE if written.code else NO_CODE,
        dtype=str(written.dtype).removeprefix("torch."),
        fp32=", ".join(f"`{part}`" for part in written.fp32),
        tokenizer=tokenizer["name"],
        vocab_size=tokenizer["vocab_size"],
        sha256=tokenizer["sha256"],
        data=_data(loaded, training["data_digest"]),
        origin=_origin(training["origin"]),
        alone=written.differences.alone,
        padded=written.differences.padded,
        decoded=written.differences.decoded,
        lengths=", ".join(map(str, LENGTHS)),
        steps=STEPS,
        evaluation="\n\n".join(_evaluation(loaded.path)) or "Not measured when this was written.",
        commit=training["commit"],
        config=OmegaConf.to_yaml(OmegaConf.structured(config)),
    )


def _data(loaded: LoadedModel, digest: str | None) -> str:
    if digest is None:
        return "none yet in this run"
    return f"`{loaded.config.data.train}`, digest of its manifest `{digest}`"


def _origin(origin: dict[str, Any] | None) -> str:
    if origin is None:
        return ""
    return (
        f"\n- The run began from the weights of `{origin['source']}`, which had been trained on "
        f"{origin['consumed_tokens']:,} tokens where it says so; those above came after."
    )


def _evaluation(checkpoint: Path) -> Iterator[str]:
    """Tables of what was measured of a checkpoint, RUN/checkpoints/step_…, in RUN/evaluation/step_…."""
    folder = checkpoint.parents[1] / "evaluation" / checkpoint.name
    if (path := folder / RESULT).is_file():
        yield _perplexity(Report.read(path))
    if (path := folder / "downstream.json").is_file():
        yield _downstream(orjson.loads(path.read_bytes()))


def _perplexity(report: Report) -> str:
    rows = [
        (
            row["documents"],
            f"{row['context']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['tokens']:,}",
        )
        for row in report.rows()
    ]
    table = _table(("documents", "context", "perplexity", "bits per byte", "tokens"), rows)
    data = report.made_of["data"]
    return f"Perplexity on `{data['prefix']}` (digest `{data['digest']}`):\n\n{table}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _downstream(report: dict[str, Any]) -> str:
    rows = [
        (name, metric, f"{number(found['value']):.4f}", "" if found["stderr"] is None else f"{found['stderr']:.4f}")
        for name, task in report["tasks"].items()
        for metric, found in task["metrics"].items()
    ]
    average = report["average"]["accuracy"]
    rows += [("average", "accuracy", f"{average:.4f}", "")] if average is not None else []
    return f"Downstream tasks, by lm-eval:\n\n{_table(('task', 'metric', 'value', '±'), rows)}"

"""Command: how fast and in how much memory our exports write text in transformers, beside its Llama of equal size.

    python -m pretrain.benchmarks.hf_decode launch/configs/demo.yaml --contexts 128 1024 8192 32768

Both models have random weights in fp32 and go on with a text of so many tokens by `generate`, greedily, one text, a few
tokens each in turn. The time of a token is that between two of them, with all that transformers does. Longhorn starts
from the state that its prompt left, which it reads in chunks. Llama's key-value cache is filled with random numbers:
reading 32768 tokens would take a CPU many minutes, and what a token costs does not depend on the numbers.

Memory: the bytes of the cache, and by how much the process grew at most over what it held with the models alone, from
the making of the cache to the last token.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache

from kernels.benchmarks.record import hardware_slug, provenance, write_json
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.benchmarks import RESULTS
from pretrain.benchmarks.llama import llama_of_equal_size
from pretrain.config import ConfigError, load_config
from pretrain.hf.mapping import to_hf_model

OURS, PEER = "Longhorn", "Llama"
TARGETS = {128: 1.0, 32768: 10.0}  # context → our tokens per second over Llama's
CHECKED_TOKENS = 24
TOLERANCE = 1e-3  # of the largest logit, in fp32
PREFILL_CHUNK = 2048
CPU = torch.device("cpu")


class WrongLogits(RuntimeError):
    """A model that writes another text with its cache than without has no speed."""


@dataclass(frozen=True)
class Contender:
    """A model, and how to make what `generate` is given to go on with a text: (ids, the argument with its cache)."""

    model: Any  # transformers' models are not typed as callable or as generating
    cache_name: str
    start: Callable[[], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Decoding:
    """Of one model at one context."""

    milliseconds: list[list[float]]  # of each token, by repeat
    cache_bytes: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / statistics.median(ms for repeat in self.milliseconds for ms in repeat)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the median of each repeat tells the noise."""
        return {
            "tokens_per_second": round(self.tokens_per_second, 2),
            "median_ms_by_repeat": [round(statistics.median(repeat), 3) for repeat in self.milliseconds],
            "cache_bytes": self.cache_bytes,
            "peak_growth_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Comparison:
    """Both models after a text of `context` tokens."""

    context: int
    found: Mapping[str, Decoding]

    @property
    def ratio(self) -> float:
        return self.found[OURS].tokens_per_second / self.found[PEER].tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        models = {name: decoding.to_dict() for name, decoding in self.found.items()}
        return {
            "context": self.context,
            "ratio": round(self.ratio, 3),
            "target": TARGETS.get(self.context),
            "models": models,
        }


def build(config: ModelConfig, longest: int) -> dict[str, PreTrainedModel]:
    """Both models, freshly initialised, that write on and on."""
    torch.manual_seed(0)
    peer = llama_of_equal_size(config, longest)
    peer.use_cache = True
    models = {OURS: to_hf_model(LanguageModel(config), None, torch.float32), PEER: LlamaForCausalLM(peer).eval()}
    for model in models.values():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return models


@torch.no_grad()
def check(name: str, model: Any) -> float:
    """The largest difference of logits, a token at a time from all at once, over the largest.

    Raises WrongLogits where rounding does not explain it.
    """
    ids = _random_ids(model, CHECKED_TOKENS)
    whole = model(ids).logits[0]
    cache_name, cache, last = _cache_name(model), None, whole
    for token in ids.split(1, 1):
        outputs = model(token, **{cache_name: cache}, use_cache=True)
        cache, last = outputs[cache_name], outputs.logits[0, -1]
    error = ((last - whole[-1]).abs().max() / whole.abs().max()).item()
    if not error <= TOLERANCE:  # so written that NaN fails
        raise WrongLogits(
            f"{name}: logits after {CHECKED_TOKENS} tokens are off by {error:.1e}, {TOLERANCE} is allowed"
        )
    return error


def contenders(models: Mapping[str, PreTrainedModel], context: int) -> dict[str, Contender]:
    """Both models after a text of `context` tokens, of which the last has not been read."""
    ours: Any = models[OURS]
    peer = models[PEER]
    ids, state = _random_ids(ours, context), None
    for chunk in ids[:, :-1].split(PREFILL_CHUNK, 1):
        with torch.no_grad():
            state = ours(chunk, cache_params=state, use_cache=True, logits_to_keep=1).cache_params
    return {
        OURS: Contender(ours, _cache_name(ours), lambda: (ids[:, -1:], copy.deepcopy(state))),
        PEER: Contender(peer, _cache_name(peer), lambda: (ids, _filled_cache(peer, context - 1))),
    }


def compare(models: Mapping[str, PreTrainedModel], context: int, tokens: int, repeats: int) -> Comparison:
    """`repeats` turns of `tokens` tokens of each model; memory is that of one more turn, the first."""
    ready = contenders(models, context)
    memory = {name: _memory(contender, tokens) for name, contender in ready.items()}
    milliseconds: dict[str, list[list[float]]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, contender in ready.items():
            milliseconds[name].append(decode(contender, *contender.start(), tokens))
    return Comparison(context, {name: Decoding(milliseconds[name], *memory[name]) for name in ready})


def decode(contender: Contender, ids: Tensor, cache: Cache, tokens: int) -> list[float]:
    """Milliseconds of each of `tokens` tokens; the one before them, which `generate` begins with, is not counted."""
    stamps = []

    def stamp(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    contender.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([stamp]),
        **{contender.cache_name: cache},
    )
    return [(end - start) * 1e3 for start, end in zip(stamps, stamps[1:], strict=False)]


def cache_bytes(cache: Cache) -> int:
    """Of all its layers' tensors."""
    held: list[Tensor | None] = []
    layer: Any
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        else:
            held += [layer.keys, layer.values]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _memory(contender: Contender, tokens: int) -> tuple[int, int]:
    """(bytes of the cache after `tokens` tokens, the process' growth at most)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is allocated now
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    ids, cache = contender.start()
    decode(contender, ids, cache, tokens)
    return cache_bytes(cache), max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _cache_name(model: PreTrainedModel) -> str:
    return "past_key_values" if isinstance(model, LlamaForCausalLM) else "cache_params"


def _random_ids(model: PreTrainedModel, count: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))


def _filled_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    config = model.config
    cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def show(name: str, models: Mapping[str, PreTrainedModel], comparisons: Sequence[Comparison], console: Console) -> None:
    """Print tokens per second and memory, by context."""
    sizes = ", ".join(f"{model}: {models[model].num_parameters():,} parameters" for model in models)
    console.print(f"{name}: {sizes}", highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for column in ("context", "model", "tokens/s", "cache MB", "growth MB", "ratio", "target"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for comparison in comparisons:
        target = TARGETS.get(comparison.context)
        for model, found in comparison.found.items():
            own = model == OURS
            table.add_row(
                str(comparison.context) if own else "",
                model,
                f"{found.tokens_per_second:,.1f}",
                f"{found.cache_bytes / 1e6:,.2f}",
                f"{found.peak_bytes / 1e6:,.1f}",
                f"{comparison.ratio:.2f}×" if own else "",
                f"≥ {target:g}×" if own and target else "",
            )
    console.print(table, highlight=False)


def draw(results: Mapping[str, Sequence[Comparison]], path: Path) -> None:
    """Tokens per second and the cache's size against the context, a row for each config."""
    figure = Figure(figsize=(9, 3.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False)
    for (config, comparisons), (speed, size) in zip(results.items(), rows, strict=True):
        contexts = [comparison.context for comparison in comparisons]
        for name in (OURS, PEER):
            found = [comparison.found[name] for comparison in comparisons]
            speed.plot(contexts, [decoding.tokens_per_second for decoding in found], "o-", label=name)
            size.plot(contexts, [decoding.cache_bytes / 1e6 for decoding in found], "o-", label=name)
        for axes, label in ((speed, "tokens per second"), (size, "cache, MB")):
            axes.set(title=config, xlabel="tokens of context", ylabel=label, xscale="log", yscale="log")
            axes.set_xticks(contexts, [str(context) for context in contexts])
            axes.minorticks_off()
            axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for wrong logits; 2 for a config or arguments that don't fit."""
    options = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    console, results, records = Console(), {}, []
    try:
        record = provenance(CPU, "transformers")
        for path in options.configs:
            config = load_config(path).model
            models = build(config, max(options.contexts) + options.tokens + 1)
            errors = {name: float(f"{check(name, model):.2g}") for name, model in models.items()}
            found = [compare(models, c, options.tokens, options.repeats) for c in sorted(options.contexts)]
            show(path, models, found, console)
            results[Path(path).stem] = found
            sizes = {name: model.num_parameters() for name, model in models.items()}
            comparisons = [comparison.to_dict() for comparison in found]
            records.append({"config": path, "parameters": sizes, "error": errors, "comparisons": comparisons})
    except (WrongLogits, ConfigError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongLogits) else 2
    finally:
        torch.set_num_threads(threads)
    settings = {name: getattr(options, name) for name in ("tokens", "repeats", "threads")}
    path = options.output / f"hf-decode-{hardware_slug(CPU)}.json"
    write_json(path, {**record, "dtype": "float32", **settings, "results": records})
    draw(results, path.with_suffix(".png"))
    console.print(f"recorded in {path}, drawn in {path.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.hf_decode", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("configs", nargs="*", default=["launch/configs/demo.yaml"], help="default: %(default)s")
    parser.add_argument("--contexts", nargs="+", type=_at_least_2, default=[128, 512, 2048, 8192, 32768])
    parser.add_argument("--tokens", type=_at_least_2, default=32, help="timed in a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=_at_least_2, default=5, help="turns of each model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record and the plot")
    return parser


def _at_least_2(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"a whole number from 2 on, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""Command: continue texts with a checkpoint's model.

python -m pretrain.generate runs/125m --prompt "The state of the Union" --tokens 200 --top-p 0.9
python -m pretrain.generate exports/longhorn-125m --prompt "The state of the Union"
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.dataset import TOKENIZER, is_dataset
from data_tools.shards import ShardPaths
from data_tools.tokenizer import Tokenizer, TokenizerError, resolve_tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import CheckpointError, LoadedModel
from pretrain.hf.folder import load_any

SEPARATOR = "\n\n---\n\n"  # between the texts of several prompts


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: divides the logits; 0 takes the likeliest token. top_k: only of so many likeliest.
    top_p: only of the fewest likeliest that hold this share of the probability. Raises ValueError
    for values that mean nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        # Not `self.temperature < 0`: a NaN is to be refused too.
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, got {self.top_p}")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Draw a token from (padded vocabulary,) logits, the padding's −inf; with a CPU generator."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, order = (logits.double().cpu() / sampling.temperature).sort(descending=True)
    if sampling.top_k is not None:
        scores[sampling.top_k :] = -torch.inf
    probabilities = scores.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0  # never the first, whose `before` is 0
    return int(order.cpu()[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    eos_id: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Ids that follow those of the prompt, up to `max_tokens` or until EOS, which is left out.

    The prompt goes through the model in one call and leaves its state behind, then each token in
    its own: a token costs the same however long the text. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; begin with EOS for a new document")
    device = model.embedding.weight.device
    state = model.new_state(1)
    generated: list[int] = []
    following = torch.tensor([prompt], device=device)
    while len(generated) < max_tokens:
        logits = model(following, state=state)[0, -1]
        token = next_token(logits, sampling, generator)
        if token == eos_id:
            break
        generated.append(token)
        following = torch.tensor([[token]], device=device)
    return generated


def tokenizer_file(loaded: LoadedModel, given: str | None) -> Path:
    """The model's SentencePiece file: `given`, else a copy beside the model, or in or beside its training data.

    Raises TokenizerError where there is none, or it is another one than the model was trained with.
    """
    path = resolve_tokenizer(given) if given else _tokenizer_beside(loaded)
    found, named = Tokenizer.load(path).sha256, loaded.tokenizer.get("sha256")
    if named and found != named:
        raise TokenizerError(
            f"{path}: its sha256 is {found}, but {loaded.path} was trained with {loaded.tokenizer['name']}, {named}"
        )
    return path


def _tokenizer_beside(loaded: LoadedModel) -> Path:
    """In an export's folder, in that of an imported run, RUN of RUN/checkpoints/step_…, or with the training data."""
    beside = [loaded.path / TOKENIZER]
    if loaded.path.parent.name == "checkpoints":
        beside.append(loaded.path.parents[1] / TOKENIZER)
    if train := loaded.config.data.train:
        beside.append(Path(train) / TOKENIZER if is_dataset(train) else ShardPaths.of(train).tokenizer)
    for path in beside:
        if path.is_file():
            return path
    raise TokenizerError(f"{beside[-1]}: the model's tokenizer isn't there; name a copy with --tokenizer")


def complete(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    text: str,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
) -> str:
    """The text and what the model adds; an empty text is the start of a document."""
    prompt = tokenizer.encode(text) or [tokenizer.eos_id]
    generator = torch.Generator().manual_seed(seed)
    added = generate(loaded.model, prompt, max_tokens, tokenizer.eos_id, sampling, generator)
    # The model's vocabulary may be larger; what it has beyond the pieces was never trained.
    return tokenizer.decode([token for token in prompt + added if token < tokenizer.vocab_size])


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = "a run's folder (its newest checkpoint), a checkpoint's, or one that transformers reads"
    parser.add_argument("checkpoint", type=Path, help=model)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="may be given several times",
    )
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="at most: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token; %(default)s")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that hold P: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every prompt: %(default)s")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the copy beside the model or its data")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: %(default)s")
    parsed = parser.parse_args(arguments)
    if parsed.tokens < 0:
        parser.error(f"--tokens {parsed.tokens}: must not be negative")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on stderr; the texts go to stdout."""
    parsed = _arguments(arguments)
    try:
        sampling = Sampling(parsed.temperature, parsed.top_k, parsed.top_p)
        loaded = load_any(parsed.checkpoint, torch.device(parsed.device))
        tokenizer = Tokenizer.load(tokenizer_file(loaded, parsed.tokenizer))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for index, text in enumerate(parsed.prompt):
        print(SEPARATOR if index else "", end="")
        print(complete(loaded, tokenizer, text, parsed.tokens, sampling, parsed.seed), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

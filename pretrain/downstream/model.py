"""A LanguageModel as lm-eval sees one: log-probabilities of texts, and their continuations.

What stands in front of a text. A training stream is documents, each with an EOS behind it, and no BOS anywhere: where
a text begins, the model has read EOS. So every text begins with EOS here: contexts of multiple choice, empty contexts,
rolling perplexity and prompts. It matters in a text's first tokens: against nothing in front, EOS lowered the loss
of the first 8 by 0.18 nats each and of the first 32 by 0.06 (± 0.002; 941 held-out texts, a model that had seen 6,000
documents); a BOS, which was never trained, made the first token cost 9.7 instead of 3.5 nats.

What belongs to a continuation. Context and continuation are tokenized as one text, so that no space of SentencePiece's
comes between them; the continuation's tokens are those from the first one that the context alone would not have. For
a continuation that begins with a space or a new line, as those of nearly all tasks, that is lm-eval's own rule.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from longhorn_layers.model import LanguageModel
from pretrain.downstream.text import TextCodec
from pretrain.generate import Sampling, next_token

BATCH_TOKENS = 8_192  # in one forward pass,
BATCH_LOGITS = 1 << 27  # or fewer: 512 MiB of logits
GENERATED_TOKENS = 256  # where a task doesn't say, as in lm-eval

Pair = tuple[list[int], list[int]]  # ids of a context, never empty, and of its continuation
Score = tuple[float, bool]  # nats of log-probability, and whether each token was the likeliest


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests with a LanguageModel, on its device.

    A request longer than `max_length` tokens loses the beginning of its context (`cut` counts them); rolling perplexity
    goes in windows of as many, each beginning anew. The model's state takes any length: it is read in chunks of
    what fits into a batch, so memory does not depend on `max_length`.
    """

    def __init__(self, model: LanguageModel, codec: TextCodec, max_length: int) -> None:
        super().__init__()
        self.model, self.codec, self.max_length = model, codec, max_length
        self.batch_tokens = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.padded_vocab_size))
        self.cut = 0
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.codec.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, the prefix in front unless `add_special_tokens` is False."""
        ids = self.codec.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        whole = self.tok_encode(context + continuation)
        alone = self.tok_encode(context.rstrip())  # spaces at its end belong to the word that follows
        differing = (i for i, (one, other) in enumerate(zip(whole, alone, strict=False)) if one != other)
        border = next(differing, min(len(whole), len(alone)))
        return whole[:border], whole[border:]

    def count_tokens(self, context: str, continuation: str) -> int:
        """Of the continuation."""
        return len(self._encode_pair(context, continuation)[1])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        return self.score([(context, continuation) for _, context, continuation in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in nats; its EOS is not part of it."""
        windows: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, found):
                windows.append(window)
                owners.append(index)
        nats = [0.0] * len(requests)
        for index, (part, _) in zip(owners, self.score(windows, disable_tqdm), strict=True):
            nats[index] += part
        return nats

    def score(self, pairs: Sequence[Pair], disable_tqdm: bool = False) -> list[Score]:
        """The score of each continuation after its context."""
        rows: dict[tuple[int, ...], list[int]] = {}  # what is read, once for all pairs that read the same
        for index, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            kept = (context + continuation)[-max(self.max_length, len(continuation)) - 1 :]
            self.cut += len(kept) < len(context) + len(continuation)
            rows.setdefault(tuple(kept[:-1]), []).append(index)
        scores: list[Score] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            for batch in self._batches(sorted(rows, key=len, reverse=True)):
                wanted = [(row, index) for row, read in enumerate(batch) for index in rows[read]]
                found = self._score_batch(batch, [(row, pairs[index][1]) for row, index in wanted])
                for (_, index), score in zip(wanted, found, strict=True):
                    scores[index] = score
                bar.update(len(wanted))
        return scores

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows, the longest first, in groups that fit one forward pass; a longer row alone."""
        while rows:
            count = max(1, self.batch_tokens // max(1, len(rows[0])))
            yield rows[:count]
            rows = rows[count:]

    @torch.inference_mode()
    def _score_batch(self, rows: list[tuple[int, ...]], wanted: list[tuple[int, list[int]]]) -> list[Score]:
        """Scores of targets (row, ids) that follow the ends of rows; padding behind a row changes nothing before it."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)
        places = [
            (owner, row, len(rows[row]) - len(targets) + i, target)
            for owner, (row, targets) in enumerate(wanted)
            for i, target in enumerate(targets)
        ]
        owner, row, position, target = torch.tensor(places, device=self._device).reshape(-1, 4).long().T
        nats = torch.zeros(len(wanted), dtype=torch.float64, device=self._device)
        misses = torch.zeros(len(wanted), dtype=torch.int64, device=self._device)
        state, start = self.model.new_state(len(rows)), 0
        for chunk in ids.split(max(1, self.batch_tokens // len(rows)), 1):
            logits = self.model(chunk, state=state)
            here = (position >= start) & (position < start + chunk.shape[1])
            losses, wrong = _compare(logits[row[here], position[here] - start], target[here])
            nats.index_add_(0, owner[here], -losses.double())
            misses.index_add_(0, owner[here], wrong.long())
            start += chunk.shape[1]
        return list(zip(nats.tolist(), (misses == 0).tolist(), strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each text, up to its first stop string."""
        return [self._continue(*request.args) for request in tqdm(requests, desc="generating", disable=disable_tqdm)]

    @torch.inference_mode()
    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        given = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
        stops, most = [stop for stop in given.pop("until") if stop], given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        try:
            sampling = Sampling(**given)
        except TypeError as error:
            raise ValueError(f"generation_kwargs: {error}; temperature, top_k and top_p there are") from error
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in {self.max_length} tokens")
        prompt = self.tok_encode(context)
        read = prompt[most - self.max_length :]
        self.cut += len(read) < len(prompt)
        state, ids, text = self.model.new_state(1), list[int](), ""
        while len(ids) < most and not any(stop in text for stop in stops):
            token = next_token(self.model(torch.tensor([read], device=self._device), state=state)[0, -1], sampling)
            if token == self.eot_token_id:
                break
            ids.append(token)
            read, text = [token], self.codec.decode(ids)
        return postprocess_generated_text(text, stops, think_end_token=None)


def _compare(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(nats of loss, whether another token is likelier) of (n, vocabulary) logits."""
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return losses, logits.argmax(-1) != target

"""The loss at several contexts and by position: the definition, on real text."""

import math

import numpy as np
import pytest
import torch

from longhorn_layers.config import AttentionConfig, GLAConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.evaluation.losses import ContextResult, EvaluationError, by_position, evaluate_contexts, position_ends


@torch.inference_mode()
def direct_nats(model: LanguageModel, tokens: np.ndarray, context: int) -> list[float]:
    """The definition: each window alone through the whole model, a softmax over the vocabulary."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = []
    for start in range(0, len(ids) - 1, context):
        logits = model(ids[None, start : start + context])[0, :, : model.config.vocab_size].double()
        targets = ids[start + 1 : start + context + 1]
        losses += (-logits.log_softmax(-1).gather(1, targets[:, None])).flatten().tolist()
    return losses


def test_equals_the_definition_on_real_text(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[:2100]
    results = evaluate_contexts(model, tokens, [1024, 64, 256], chunk=96, batch_tokens=500)
    assert [result.context for result in results] == [64, 256, 1024]
    for result in results:
        expected = direct_nats(model, tokens[:2049], result.context)
        assert result.tokens == len(expected) == 2048
        assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert len({round(result.nats, 1) for result in results}) == 3  # the context does matter


@pytest.mark.parametrize("chunk", [1, 37, 127, 129])
def test_chunks_do_not_change_the_loss(model: LanguageModel, stream: np.ndarray, chunk: int) -> None:
    tokens = stream[:257]
    (whole,) = evaluate_contexts(model, tokens, [128], chunk=128)
    (chunked,) = evaluate_contexts(model, tokens, [128], chunk=chunk)
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6)


def test_batches_do_not_change_the_loss(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[: 7 * 128 + 1]  # the last batch is smaller
    (alone,) = evaluate_contexts(model, tokens, [128], batch_tokens=1)
    (batched,) = evaluate_contexts(model, tokens, [128], batch_tokens=3 * 128)
    assert batched.nats == pytest.approx(alone.nats, rel=1e-6)


def test_the_state_is_reset_at_each_window(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[:1025]
    (both,) = evaluate_contexts(model, tokens, [512])
    halves = [evaluate_contexts(model, tokens[i : i + 513], [512])[0].nats for i in (0, 512)]
    assert both.nats == pytest.approx(sum(halves), rel=1e-6)
    (carried,) = evaluate_contexts(model, tokens, [1024])
    assert abs(carried.nats - both.nats) > 1e-2


def test_the_same_targets_at_every_context(stream: np.ndarray) -> None:
    """With a model that knows only the target itself, any difference of targets would show."""

    class TargetsOnly(torch.nn.Module):
        embedding = torch.nn.Embedding(1, 1)

        def new_state(self, batch_size: int) -> None:
            return None

        def forward(self, ids, targets, state, reduction):
            return targets.double() ** 2 + 1e-3 * ids

    results = evaluate_contexts(TargetsOnly(), stream[:3000], [16, 128, 512], chunk=50)
    scored = stream[:2561].astype(np.float64)
    expected = (scored[1:] ** 2).sum() + 1e-3 * scored[:-1].sum()
    assert [result.nats for result in results] == pytest.approx([expected] * 3, rel=1e-12)
    assert [result.tokens for result in results] == [2560] * 3


def test_positions_are_the_definition_on_real_text(model: LanguageModel, stream: np.ndarray) -> None:
    """Each position of the shortest windows that reach it; errors between windows, not between their tokens."""
    results = evaluate_contexts(model, stream[:1025], [64, 256], chunk=50, batch_tokens=500)
    found = by_position(results)
    assert [p.last for p in found] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert [p.first for p in found] == [1, *(p.last + 1 for p in found[:-1])]
    direct = {c: np.array(direct_nats(model, stream[:1025], c)).reshape(-1, c) for c in (64, 256)}
    for position in found:
        windows = direct[64 if position.last <= 64 else 256]
        means = windows[:, position.first - 1 : position.last].mean(1)
        assert position.targets == len(means) * (position.last - position.first + 1)
        assert position.loss == pytest.approx(means.mean(), rel=1e-6)
        assert position.standard_error == pytest.approx(means.std(ddof=1) / len(means) ** 0.5, rel=1e-4)
    [_, longest] = results
    assert sum(p.loss * p.targets for p in longest.positions) == pytest.approx(longest.nats, rel=1e-12)


def test_one_window_has_no_error_and_every_context_ends_a_bucket(model: LanguageModel, stream: np.ndarray) -> None:
    [result] = evaluate_contexts(model, stream[:101], [100])
    assert all(math.isnan(position.standard_error) for position in result.positions)
    assert position_ends([100, 10]) == [1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 100]
    assert len(position_ends([131072])) == 34


@pytest.mark.parametrize(
    ("mixer", "d_ff"), [(MambaConfig(d_state=4), 0), (GLAConfig(n_head=2), 32), (AttentionConfig(head_dim=8), 32)]
)
def test_every_mixer_walks_a_window_in_chunks(mixer: MixerConfig, d_ff: int, stream: np.ndarray) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer, vocab_size=512, d_model=16, n_layer=2, d_ff=d_ff)).eval()
    torch.nn.init.normal_(model.embedding.weight)
    [whole] = evaluate_contexts(model, stream[:257], [128], chunk=128)
    [chunked] = evaluate_contexts(model, stream[:257], [128], chunk=37)
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6)
    [carried] = evaluate_contexts(model, stream[:257], [32])
    assert abs(carried.nats - whole.nats) > 1e-2  # what is far back matters


def test_progress_hears_every_token(model: LanguageModel, stream: np.ndarray) -> None:
    heard = []
    evaluate_contexts(model, stream[:1025], [256, 512], chunk=200, on_tokens=heard.append)
    assert sum(heard) == 2 * 1024


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([512, 1024], "1,000 tokens are too few for a context of 1,024 tokens"),
        ([1000], "1,000 tokens are too few for a context of 1,000 tokens and the target"),
        ([96, 256], "context 96 does not divide the largest, 256"),
        ([0, 256], "context 0"),
    ],
)
def test_contexts_that_cannot_be_scored(
    model: LanguageModel, stream: np.ndarray, contexts: list[int], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate_contexts(model, stream[:1000], contexts)


def test_perplexity_of_a_broken_model_is_not_an_error() -> None:
    assert ContextResult(1, 1, 1e4).perplexity == math.inf
    assert math.isnan(ContextResult(1, 1, math.nan).perplexity)


def test_bits_per_byte() -> None:
    assert ContextResult(8, 100, 100 * math.log(2)).bits_per_byte(400) == pytest.approx(0.25)
    assert math.isnan(ContextResult(8, 1, 1.0).bits_per_byte(0))

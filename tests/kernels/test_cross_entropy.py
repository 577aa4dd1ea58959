"""Losses and gradients against float64 autograd of the definition, with all logits at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import chunked, cross_entropy, linear_cross_entropy

PADDED, VOCAB, D_MODEL = 128, 101, 37
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


pytestmark = pytest.mark.usefixtures("poison_buffers")


def make(
    shape: tuple[int, ...] = (3, 13), dtype: torch.dtype = torch.float32, scale: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight (leaves that require gradients) and targets, some of them ignored."""
    torch.manual_seed(sum(shape))
    hidden = torch.randn(*shape, D_MODEL, dtype=dtype)
    weight = (torch.randn(PADDED, D_MODEL, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(VOCAB, shape).masked_fill(torch.rand(shape) < 0.2, -100)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def expected(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-token losses, with the padding's logits at -inf as a model would hand them out."""
    padding = torch.arange(logits.shape[-1]) >= VOCAB
    logits = logits.masked_fill(padding, float("-inf"))
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - chosen) * (targets != -100)


def expected_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, gradient of hidden, gradient of weight) in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = expected(hidden @ weight.t(), targets)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), seed.double())


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("chunk_size", [1, 7, 39, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sum(dtype: torch.dtype, chunk_size: int | None) -> None:
    hidden, weight, targets = make(dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, chunk_size=chunk_size)
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    dhidden, dweight = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert dhidden.dtype == dweight.dtype == dtype

    seed = torch.full(targets.shape, 0.25)
    losses, exact_dhidden, exact_dweight = expected_gradients(hidden, weight, targets, seed)
    assert_close(loss, losses.sum(), TOLERANCE[dtype])
    assert_close(dhidden, exact_dhidden, TOLERANCE[dtype])
    assert_close(dweight, exact_dweight, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_size", [1, 7, 39, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_per_token(dtype: torch.dtype, chunk_size: int | None) -> None:
    hidden, weight, targets = make(dtype=dtype)
    losses = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction="none", chunk_size=chunk_size)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    seed = torch.randn(targets.shape).to(losses.dtype)
    dhidden, dweight = torch.autograd.grad(losses, (hidden, weight), seed)

    exact, exact_dhidden, exact_dweight = expected_gradients(hidden, weight, targets, seed)
    assert_close(losses, exact, TOLERANCE[dtype])
    assert_close(dhidden, exact_dhidden, TOLERANCE[dtype])
    assert_close(dweight, exact_dweight, TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_tokens_and_padding_get_exactly_zero(reduction: str) -> None:
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    ignored = targets == -100
    assert (dhidden[ignored] == 0).all() and (dhidden[~ignored] != 0).all()
    assert (dweight[VOCAB:] == 0).all() and (dweight[:VOCAB] != 0).all()
    if reduction == "none":
        assert (loss[ignored] == 0).all() and (loss[~ignored] > 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_ignored(reduction: str) -> None:
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, 7), ignore_index=7, reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all((t == 0).all() for t in (loss, *gradients))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_extreme_logits(reduction: str) -> None:
    hidden, weight, targets = make(scale=2000.0)  # logits of about ±1e4
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    losses, exact_dhidden, exact_dweight = expected_gradients(hidden, weight, targets, torch.ones(targets.shape))
    assert losses.max() > 1e4
    assert_close(loss.sum(), losses.sum(), 1e-5)
    assert_close(dhidden, exact_dhidden, 1e-3)  # softmax of fp32 logits: their rounding is 1e-3
    assert_close(dweight, exact_dweight, 1e-3)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(reduction: str, hidden_dtype: torch.dtype) -> None:
    """bf16 matmuls, fp32 softmax, and fp32 sums for the gradient of fp32 weights."""
    hidden, weight, targets = make((4, 250))
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction, chunk_size=8)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.dtype == dweight.dtype == torch.float32 and dhidden.dtype == hidden_dtype

    low = [t.detach().bfloat16() for t in (hidden, weight)]
    logits = low[0] @ low[1].t()
    assert logits.dtype == torch.bfloat16
    assert_close(loss.sum(), expected(logits.double(), targets).sum(), 1e-6)
    _, exact_dhidden, exact_dweight = expected_gradients(*low, targets, torch.ones(targets.shape))
    assert_close(dhidden, exact_dhidden, 2e-2)
    # 125 chunks summed in bf16 would be off by several per cent.
    assert (dweight.double() - exact_dweight).norm() <= 5e-3 * exact_dweight.norm()


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, targets = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB)
    assert_close(loss, expected(hidden @ weight.t(), targets).sum(), 1e-13)


def test_tied_weight_gets_both_gradients() -> None:
    """The head shares the embedding's matrix: its gradient adds to the embedding's."""
    _, weight, targets = make()
    tokens = torch.randint(VOCAB, targets.shape)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(weight), weight)[0]

    actual = gradient(lambda w: linear_cross_entropy(w[tokens].tanh(), w, targets, vocab_size=VOCAB))
    exact = gradient(lambda w: expected(w.double()[tokens].tanh() @ w.double().t(), targets).sum())
    assert_close(actual, exact.double(), 1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_one_gradient_only(reduction: str, needed: str) -> None:
    hidden, weight, targets = make()
    both = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum(), (hidden, weight)
    )
    if needed == "hidden":
        weight = weight.detach()
    else:
        hidden = hidden.detach()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    wanted = hidden if needed == "hidden" else weight
    assert torch.equal(torch.autograd.grad(loss, wanted)[0], both[needed == "weight"])


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_never_makes_all_logits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, log_softmax = [], torch.log_softmax

    def counting(logits: Tensor, dim: int) -> Tensor:
        rows.append(len(logits))
        return log_softmax(logits, dim)

    monkeypatch.setattr(torch, "log_softmax", counting)
    hidden, weight, targets = make((2, 50))
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_size=30)
    loss.sum().backward()
    assert rows == [30, 30, 30, 10] * (1 if reduction == "sum" else 2)


def test_without_gradients_only_losses_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make()
    exact = linear_cross_entropy(hidden, weight, targets).detach()
    monkeypatch.delattr(chunked._Gradients, "add")
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), exact)


def test_views_and_single_tokens() -> None:
    hidden, weight, targets = make((4, 10))
    view, words = hidden.transpose(0, 1), targets.t()
    loss = linear_cross_entropy(view, weight, words)
    dview = torch.autograd.grad(loss, hidden)[0]
    exact = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(dview, torch.autograd.grad(exact, hidden)[0])

    one = linear_cross_entropy(hidden[0, 0], weight, targets.clamp(min=0)[0, 0], reduction="none")
    assert one.shape == () and one > 0


def test_no_tokens() -> None:
    hidden, weight, targets = make((2, 0))
    loss = linear_cross_entropy(hidden, weight, targets)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and dhidden.shape == hidden.shape and (dweight == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_of_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = make(dtype=dtype)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    losses = cross_entropy(logits, targets, vocab_size=VOCAB)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    double = logits.detach().double().requires_grad_()
    exact = expected(double, targets)
    assert_close(losses, exact, min(TOLERANCE[dtype], 1e-5))
    assert_close(dlogits, torch.autograd.grad(exact.sum(), double)[0], TOLERANCE[dtype])
    assert (dlogits[targets == -100] == 0).all() and (dlogits[..., VOCAB:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(128, 36)}, r"don't fit: \(2, 37\) and \(128, 36\)"),
        ({"weight": torch.ones(128, 37).bfloat16()}, "one dtype outside of autocast"),
        ({"targets": torch.tensor([1, 101])}, r"target 101 is neither in 0…100"),
        ({"targets": torch.tensor([-1, 1])}, r"target -1 is neither .* ignore_index = -100"),
        ({"targets": torch.tensor([1])}, r"int64 of shape \(2,\), not torch.int64 of \(1,\)"),
        ({"targets": torch.tensor([1, 1]).int()}, "not torch.int32"),
        ({"vocab_size": 129}, r"vocab_size must be in 1…128 \(padded_vocab\), not 129"),
        ({"reduction": "mean"}, "reduction must be 'sum' or 'none', not 'mean'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {
        "hidden": torch.ones(2, 37),
        "weight": torch.ones(128, 37),
        "targets": torch.tensor([1, 2]),
        "vocab_size": VOCAB,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | changes))

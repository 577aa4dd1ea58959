"""The softmax of the linear cross-entropy in Triton, alone and in the op, against float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.cross_entropy.triton as triton_softmax
from kernels.cross_entropy import VocabShard, linear_cross_entropy
from kernels.triton_math import INTERPRETED

pytestmark = pytest.mark.usefixtures("poison_buffers")

WIDTH = 128
# How far rounding may move a number, of itself: a GPU goes to the nearest bf16, the interpreter towards zero.
HALF = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
DTYPES = [torch.float32, *HALF]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128 columns span four blocks."""
    monkeypatch.setattr(triton_softmax, "BLOCK", 32)
    monkeypatch.setattr(triton_softmax, "NUM_WARPS", 1)


def make_logits(tokens: int, words: int, width: int, dtype: torch.dtype, device: str, scale: float = 3.0) -> Tensor:
    """Random in the first `words` columns, NaN in the padding."""
    torch.manual_seed(tokens + words)
    logits = torch.full((tokens, width), torch.nan, dtype=dtype)
    logits[:, :words] = (torch.randn(tokens, words) * scale).to(dtype)
    return logits.to(device)


def exact(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the sum of exponentials, the targets' logits or 0, gradient) in float64 on the CPU."""
    logits, targets, scale = logits.cpu().double(), targets.cpu(), scale.cpu().double()
    here = (targets >= 0) & (targets < logits.shape[1])
    index = targets.where(here, 0).unsqueeze(1)
    onehot = torch.zeros_like(logits).scatter_(1, index, here.double().unsqueeze(1))
    chosen = logits.gather(1, index).squeeze(1).where(here, 0.0)
    return logits.logsumexp(1), chosen, (logits.softmax(1) - onehot) * scale.unsqueeze(1)


def check_softmax(logits: Tensor, words: int, targets: Tensor, scale: Tensor) -> None:
    log_sum, chosen, gradient = exact(logits[:, :words], targets, scale)
    found = triton_softmax.statistics(logits, words, targets)
    maximum, total, target = found.cpu().double()
    assert found.dtype == torch.float32
    assert torch.equal(maximum, logits[:, :words].cpu().double().amax(1))
    assert torch.equal(target, chosen)
    assert (maximum + total.log() - log_sum).abs().max() <= 1e-6 * max(1.0, float(log_sum.abs().max()))

    result = triton_softmax.gradient(logits, words, targets, found, scale)
    assert result.shape == (len(logits), words) and result.data_ptr() == logits.data_ptr()
    tolerance = HALF.get(logits.dtype, 1e-6) * gradient.abs() + 1e-6  # underflow, and the exponential's error
    assert ((result.cpu().double() - gradient).abs() <= tolerance).all()


@pytest.mark.parametrize("words", [1, 31, 32, 33, 101, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(small_blocks: None, device: str, dtype: torch.dtype, words: int) -> None:
    """Any number of words, the rest of the row NaN; targets in it, below and beyond, and of no weight."""
    logits = make_logits(5, words, WIDTH, dtype, device)
    targets = torch.tensor([0, words - 1, -1, words, -(2**40)], device=device)
    check_softmax(logits, words, targets, torch.tensor([1.0, -0.5, 2.0, 1.0, 0.25], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_shipped(device: str, dtype: torch.dtype) -> None:
    logits = make_logits(2, 5001, 5120, dtype, device)
    check_softmax(logits, 5001, torch.tensor([4999, 7], device=device), torch.ones(2, device=device))


def test_extreme_logits(small_blocks: None, device: str) -> None:
    logits = make_logits(3, 101, WIDTH, torch.float32, device, scale=1e4)
    logits[1, :64] = -torch.inf  # whole blocks
    logits[2, :101] = -torch.inf
    logits[2, 70] = -1e4
    check_softmax(logits, 101, torch.tensor([5, 80, 70], device=device), torch.ones(3, device=device))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays(small_blocks: None, device: str, value: float) -> None:
    """One NaN (or +inf: inf - inf) makes its token's sum and gradient NaN, and no other's."""
    logits = make_logits(3, 101, WIDTH, torch.float32, device)
    logits[1, 40] = value
    targets, scale = torch.tensor([1, 2, 3], device=device), torch.ones(3, device=device)
    found = triton_softmax.statistics(logits, 101, targets)
    assert found[1].isnan().tolist() == [False, True, False]
    gradient = triton_softmax.gradient(logits, 101, targets, found, scale)
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_no_finite_logit(small_blocks: None, device: str) -> None:
    """All -inf, or no words: a rank that adds nothing to the others' sum."""
    logits = torch.full((2, WIDTH), -torch.inf, device=device)
    targets = torch.tensor([-1, 3], device=device)
    for words in (101, 0):
        found = triton_softmax.statistics(logits, words, targets).tolist()
        assert found == [[-math.inf] * 2, [0.0, 0.0], [0.0, -math.inf if words else 0.0]]
    assert triton_softmax.gradient(logits, 0, targets, torch.ones(3, 2, device=device), targets).shape == (2, 0)


def test_zero_scale_is_zero_gradient(small_blocks: None, device: str) -> None:
    logits = torch.full((1, WIDTH), torch.nan, device=device)
    token, zero = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    found = triton_softmax.statistics(logits, 101, token)
    assert (triton_softmax.gradient(logits, 101, token, found, zero) == 0).all()
    assert (logits == 0).all()  # the padding too: nothing odd is left for the next chunk


PADDED, VOCAB, D_MODEL = 128, 101, 19
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hidden = torch.randn(2, 5, D_MODEL).to(device, dtype).requires_grad_()
    weight = (torch.randn(PADDED, D_MODEL) * 0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(VOCAB, (2, 5), device=device)
    targets[0, 1] = targets[1, 4] = -100
    return hidden, weight, targets


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, gradient of hidden, gradient of weight) in float64."""
    hidden, weight = (t.detach().cpu().double().requires_grad_() for t in (hidden, weight))
    logits = (hidden @ weight[:VOCAB].t()).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, targets.cpu().flatten(), reduction="none").view(targets.shape)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), seed.cpu().double())


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    assert (actual.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(small_blocks: None, device: str, dtype: torch.dtype, reduction: str, chunk_size: int | None) -> None:
    hidden, weight, targets = make(dtype, device)
    seed = (torch.rand if reduction == "none" else torch.ones)(targets.shape, device=device)
    options = {"vocab_size": VOCAB, "reduction": reduction, "chunk_size": chunk_size, "backend": "triton"}
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), seed.view(-1)[0] if reduction == "sum" else seed)
    losses, exact_dhidden, exact_dweight = expected(hidden, weight, targets, seed)
    assert loss.dtype == torch.float32 and dhidden.dtype == dweight.dtype == dtype
    assert_close(loss, losses if reduction == "none" else losses.sum(), TOLERANCE[dtype])
    assert_close(dhidden, exact_dhidden, TOLERANCE[dtype])
    assert_close(dweight, exact_dweight, TOLERANCE[dtype])
    assert (dhidden[targets == -100] == 0).all() and (dweight[VOCAB:] == 0).all()

    again = linear_cross_entropy(hidden, weight, targets, **options)
    assert torch.equal(again, loss)


def test_vocabulary_over_ranks(small_blocks: None, device: str) -> None:
    """Two ranks, one after the other: first to write down their statistics, then with both's."""
    hidden, weight, targets = make(torch.float32, device)
    sent: list[Tensor] = []

    def run(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        part = weight.detach()[64 * rank : 64 * rank + 64].clone().requires_grad_()
        shard = VocabShard(64 * rank, gather)
        loss = linear_cross_entropy(hidden, part, targets, vocab_size=VOCAB, shard=shard, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, (hidden, part))

    for rank in range(2):
        run(rank, lambda statistics: (sent.append(statistics.clone()), statistics.unsqueeze(0))[1])
    (loss, part0, rows0), (same, part1, rows1) = (run(rank, lambda _: torch.stack(sent)) for rank in range(2))
    losses, dhidden, dweight = expected(hidden, weight, targets, torch.ones(targets.shape))
    assert torch.equal(loss, same)
    assert_close(loss, losses.sum(), 1e-5)
    assert_close(part0 + part1, dhidden, 1e-5)
    assert_close(torch.cat((rows0, rows1)), dweight, 1e-5)


def test_without_gradients_no_gradient_is_made(
    small_blocks: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = make(torch.float32, device)
    monkeypatch.delattr(triton_softmax, "gradient_kernel")
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, backend="triton")
    assert_close(loss, expected(hidden, weight, targets, torch.ones(targets.shape))[0].sum(), 1e-5)


def test_float64_is_refused(device: str) -> None:
    hidden = torch.ones(2, 3, dtype=torch.float64, device=device)
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="computes in fp32; for float64 use backend 'cpu'"):
        linear_cross_entropy(hidden, hidden, targets, backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU whether anything waits for it")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_waits_for_the_gpu(reduction: str) -> None:
    hidden, weight, targets = make(torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Losses and gradients against float64 autograd of the definition, with all logits at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import VocabShard, chunked, cross_entropy, linear_cross_entropy

PADDED, VOCAB, D_MODEL = 128, 101, 37
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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


def expected(logits: Tensor, targets: Tensor, vocab_size: int = VOCAB) -> Tensor:
    """Per-token losses, with the padding's logits at -inf as a model would hand them out."""
    padding = torch.arange(logits.shape[-1]) >= vocab_size
    logits = logits.masked_fill(padding, float("-inf"))
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - chosen) * (targets != -100)


def expected_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, seed: Tensor, vocab_size: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, gradient of hidden, gradient of weight) in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = expected(hidden @ weight.t(), targets, vocab_size)
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
    rows, mm = [], torch.mm

    def counting(hidden: Tensor, head: Tensor, *, out: Tensor) -> Tensor:
        rows.append(len(out))
        return mm(hidden, head, out=out)

    monkeypatch.setattr(torch, "mm", counting)
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


@pytest.mark.parametrize("ranks", [None, 2])
def test_nan_reaches_its_tokens_loss(ranks: int | None) -> None:
    hidden, weight, targets = make(dtype=torch.float64)
    with torch.no_grad():
        hidden[1, 5], targets[1, 5:7] = torch.nan, torch.tensor([3, 4])
    if ranks is None:
        losses = [linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction="none")]
    else:
        losses = [rank[0] for rank in run_shards(hidden, weight, targets, ranks, VOCAB, reduction="none")]
    for loss in losses:
        assert loss[1, 5].isnan() and loss.isnan().sum() == 1


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_ignored_tokens_nan_moves_neither_loss_nor_its_gradient(reduction: str) -> None:
    hidden, weight, targets = make()
    with torch.no_grad():
        hidden[1, 5], targets[1, 5] = torch.nan, -100
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.isfinite().all() and dhidden.isfinite().all() and (dhidden[1, 5] == 0).all()
    assert dweight[:VOCAB].isnan().all()  # 0·NaN: the NaN is not hidden


def test_default_chunks_suit_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [chunked._default_chunk(cpu, rows) for rows in (512, 4096, 32000, 10**7)] == [2048, 256, 128, 128]
    assert chunked._default_chunk(gpu, 32000) == 2048


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


def run_shards(
    hidden: Tensor, weight: Tensor, targets: Tensor, ranks: int, vocab_size: int, seed: Tensor | None = None, **options
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(loss, hidden's part of the gradient, its rows' gradient) of each rank, one rank after the other.

    A first walk writes down what each rank hands to its gather, which nothing gathered can change;
    the second gives every rank all of it, as the processes would get it.
    """
    rows = len(weight) // ranks
    sent: list[list[Tensor]] = [[] for _ in range(ranks)]

    def run(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        part = weight.detach()[rank * rows : (rank + 1) * rows].clone().requires_grad_()
        shard = VocabShard(rank * rows, gather)
        loss = linear_cross_entropy(hidden, part, targets, vocab_size=vocab_size, shard=shard, **options)
        gradients = torch.autograd.grad(loss, (hidden, part), torch.ones_like(loss) if seed is None else seed.to(loss))
        return loss.detach(), *gradients

    def second(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        chunks = zip(*sent, strict=True)  # every rank has come as often

        def gather(statistics: Tensor) -> Tensor:
            parts = next(chunks)
            assert torch.equal(statistics.nan_to_num(), parts[rank].nan_to_num())
            return torch.stack(parts)

        result = run(rank, gather)
        assert next(chunks, None) is None
        return result

    for rank, ours in enumerate(sent):
        run(rank, lambda statistics, ours=ours: (ours.append(statistics.clone()), statistics.unsqueeze(0))[1])
    return [second(rank) for rank in range(ranks)]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vocabulary_over_ranks(dtype: torch.dtype, ranks: int, chunk_size: int | None, reduction: str) -> None:
    hidden, weight, targets = make(dtype=dtype)
    seed = torch.randn(targets.shape) if reduction == "none" else torch.ones(targets.shape)
    results = run_shards(
        *(hidden, weight, targets, ranks, VOCAB),
        seed=seed if reduction == "none" else None,
        reduction=reduction,
        chunk_size=chunk_size,
    )
    losses, dhidden, dweight = expected_gradients(hidden, weight, targets, seed)
    for loss, _, _ in results:
        assert_close(loss, losses if reduction == "none" else losses.sum(), TOLERANCE[dtype])
        assert torch.equal(loss, results[0][0])
    assert_close(sum(part.double() for _, part, _ in results), dhidden, TOLERANCE[dtype])
    assert_close(torch.cat([rows for _, _, rows in results]), dweight, TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ranks_without_words_or_targets(reduction: str) -> None:
    """Padding may fill the last ranks; all targets may lie on one, or be ignored."""
    hidden, weight, _ = make(dtype=torch.float64)
    targets = torch.full(hidden.shape[:-1], 3)
    targets[0] = -100
    results = run_shards(hidden, weight, targets, 4, 32, reduction="none")
    losses, dhidden, dweight = expected_gradients(hidden, weight, targets, torch.ones(targets.shape), 32)
    for loss, _, _ in results:
        assert_close(loss, losses, 1e-12)
    assert_close(sum(part for _, part, _ in results), dhidden, 1e-12)
    assert_close(results[0][2], dweight[:32], 1e-12)
    assert all((part == 0).all() and (rows == 0).all() for _, part, rows in results[1:])

    ignored = torch.full_like(targets, -100)
    for tensors in run_shards(hidden, weight, ignored, 4, 32, reduction=reduction):
        assert all((t == 0).all() for t in tensors)


def test_extreme_logits_over_ranks() -> None:
    hidden, weight, targets = make(scale=2000.0)  # of about ±1e4: a rank's maximum is far below the others'
    results = run_shards(hidden, weight, targets, 4, VOCAB)
    losses, dhidden, dweight = expected_gradients(hidden, weight, targets, torch.ones(targets.shape))
    assert_close(results[0][0], losses.sum(), 1e-5)
    assert_close(sum(part for _, part, _ in results), dhidden, 1e-3)
    assert_close(torch.cat([rows for _, _, rows in results]), dweight, 1e-3)


def test_logits_of_minus_infinity_on_one_rank() -> None:
    hidden, weight, targets = make(dtype=torch.float64)
    with torch.no_grad():
        hidden.abs_()
        weight[64:] = -torch.inf
    targets = targets.clamp(min=0) % 64
    exact, _, _ = expected_gradients(hidden, weight[:64], targets, torch.ones(targets.shape), 64)
    for loss, _, _ in run_shards(hidden, weight, targets, 2, 128, reduction="none"):
        assert_close(loss, exact, 1e-12)


def test_ranks_with_fewer_words_take_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_STEP", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_LOGITS", 320)
    hidden, weight, targets = make()
    calls = []
    for first in (0, 96):
        shard = VocabShard(first, lambda s, first=first: (calls.append((first, s.shape)), s.unsqueeze(0))[1])
        linear_cross_entropy(hidden, weight[:32], targets, vocab_size=VOCAB, shard=shard)
    assert [shape for first, shape in calls if first == 0] == [(3, 10), (3, 10), (3, 10), (3, 9)]
    assert [shape for first, shape in calls if first == 96] == [(3, 10), (3, 10), (3, 10), (3, 9)]


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
        ({"backend": "gpu"}, "backend must be one of .*'triton'.*, not 'gpu'"),
        ({"hidden": torch.ones(2, 37, device="meta")}, "on one device, not meta, cpu, cpu"),
        ({"shard": VocabShard(0, torch.clone), "vocab_size": None}, "a shard needs vocab_size, .* not None and 0"),
        ({"shard": VocabShard(-1, torch.clone)}, "first word of at least 0, not 101 and -1"),
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

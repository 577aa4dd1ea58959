"""Causal attention: every backend that runs here against autograd on the float64 reference."""

import importlib.util
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, flash

# One token, a batch, more keys than queries (a cache before them), one query on many keys, none at all.
SHAPES = [(1, 1), (5, 5), (130, 130), (7, 19), (77, 300), (1, 9), (0, 4)]


def make_inputs(batch: int, seqlen: int, seqlen_k: int, n_head: int = 3, head_dim: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(batch, length, n_head, head_dim, dtype=torch.float64, generator=generator)

    return {"q": draw(seqlen), "k": draw(seqlen_k), "v": draw(seqlen_k)}


def outputs_and_gradients(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = attention(**leaves, **options)
    # Cotangents that bf16 holds exactly: autograd hands them back in out's dtype.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    gradients = torch.autograd.grad((out * cotangent.to(out)).sum(), list(leaves.values()))
    return {"out": out} | dict(zip(leaves, gradients, strict=True))


def reference(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    wide = {name: t.double() for name, t in inputs.items()}
    return outputs_and_gradients(wide, backend="reference", **options)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor; NaN fails. Where all is 0, as gradients of one key, absolute."""
    for name, expected in want.items():
        if expected.numel():
            scale = expected.abs().max().clamp(min=1.0)
            error = ((got[name].cpu().double() - expected).abs() / scale).max()
            assert error <= tolerance, f"{name}: {error:.2e}"


def test_reference_is_softmax_attention() -> None:
    """Written out with plain indices: query t of 2 sees the keys up to t + 3 of 5."""
    x = make_inputs(1, 2, 5, 1, 4)
    out = attention(**x, backend="reference")
    for t in range(2):
        q, keys, values = x["q"][0, t, 0], x["k"][0, : t + 4, 0], x["v"][0, : t + 4, 0]
        weights = torch.exp(keys @ q / 4**0.5)
        torch.testing.assert_close(out[0, t, 0], (weights / weights.sum()) @ values)


@pytest.mark.parametrize(("seqlen", "seqlen_k"), SHAPES)
def test_sdpa_matches_the_reference(seqlen: int, seqlen_k: int) -> None:
    inputs = make_inputs(2, seqlen, seqlen_k)
    assert_close(outputs_and_gradients(inputs, backend="sdpa"), reference(inputs), 1e-13)
    assert_close(outputs_and_gradients({n: t.float() for n, t in inputs.items()}), reference(inputs), 2e-6)
    half = {name: t.bfloat16() for name, t in inputs.items()}
    got = outputs_and_gradients(half)
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    assert_close(got, reference(half), 2**-6)  # the weights of a softmax are rounded, too


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_nothing_depends_on_what_comes_later(backend: str) -> None:
    inputs = make_inputs(1, 20, 33)
    out = attention(**inputs, backend=backend)
    for name in ("k", "v"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 13 + 8 :] += 1  # the keys of queries 8 …
    changed = attention(**inputs, backend=backend)
    torch.testing.assert_close(changed[:, :8], out[:, :8], rtol=0, atol=1e-14)
    assert not torch.isclose(changed[:, 8:], out[:, 8:]).all(-1).any()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_token_by_token_and_in_pieces_equals_the_whole(backend: str) -> None:
    inputs = make_inputs(2, 40, 40)
    whole = attention(**inputs, backend=backend)
    bounds = [0, 13, 14, 15, 40]
    for start, end in pairwise(bounds):
        seen = {"q": inputs["q"][:, start:end], "k": inputs["k"][:, :end], "v": inputs["v"][:, :end]}
        torch.testing.assert_close(attention(**seen, backend=backend), whole[:, start:end])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_documents_equal_separate_ones(backend: str) -> None:
    bounds = [0, 1, 40, 40, 75, 140]  # a document of one token, and an empty one
    inputs = make_inputs(1, 140, 140)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = outputs_and_gradients(inputs, backend=backend, cu_seqlens=cu_seqlens)
    assert_close(got, reference(inputs, cu_seqlens=cu_seqlens), 1e-13)
    for start, end in pairwise(bounds):
        alone = {name: t[:, start:end] for name, t in inputs.items()}
        torch.testing.assert_close(got["out"][:, start:end], attention(**alone, backend="reference"))


def test_large_scores_do_not_overflow() -> None:
    inputs = make_inputs(1, 30, 30) | {"k": 1e4 * make_inputs(1, 30, 30)["k"]}
    single = {name: t.float() for name, t in inputs.items()}
    got = outputs_and_gradients(single)
    assert all(t.isfinite().all() for t in got.values())
    # fp32 rounds scores near 1e4 by 5e-4: a softmax of two near ones shows it.
    torch.testing.assert_close(got["out"].double(), reference(single)["out"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_autocast_does_not_change_the_dtype(backend: str) -> None:
    inputs = {name: t.float() for name, t in make_inputs(1, 9, 9).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(**inputs, backend=backend)
    assert out.dtype == torch.float32
    assert_close({"out": out}, {"out": reference(inputs)["out"]}, 1e-6 if backend == "reference" else 2**-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend must be one of"),
        ({"q": torch.zeros(2, 5, 4)}, r"q must be \(batch, seqlen, n_head, head_dim\), got shape \(2, 5, 4\)"),
        ({"k": torch.zeros(5, 3, 4)}, r"k must be \(batch, seqlen, n_head, head_dim\)"),
        ({"k": torch.zeros(2, 5, 1, 4)}, r"k must have shape \(2, 5, 3, 4\), got \(2, 5, 1, 4\)"),
        ({"v": torch.zeros(2, 6, 3, 4)}, r"v must have shape \(2, 5, 3, 4\), got \(2, 6, 3, 4\)"),
        ({"v": torch.zeros(2, 5, 3, 4, device="meta")}, "v must be on q's device, cpu, got meta"),
        ({"v": torch.zeros(2, 5, 3, 4).bfloat16()}, "v must have q's dtype, torch.float32, got torch.bfloat16"),
        ({"q": torch.zeros(2, 6, 3, 4)}, "k must be at least as long as q, 6 tokens, got 5"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "into a batch of 1, got batch 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be int32"),
        ({"backend": "flash"}, "'flash' needs bf16 or fp16 on a GPU and head_dim ≤ 256, q is torch.float32 on cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    inputs = dict.fromkeys(("q", "k", "v"), torch.zeros(2, 5, 3, 4))
    with pytest.raises(ValueError, match=message):
        attention(**{**inputs, **change})


def test_documents_have_no_cache_and_cover_the_row() -> None:
    inputs = {"q": torch.zeros(1, 5, 3, 4), "k": torch.zeros(1, 6, 3, 4), "v": torch.zeros(1, 6, 3, 4)}
    with pytest.raises(ValueError, match="with cu_seqlens k must be as long as q, 5 tokens, got 6"):
        attention(**inputs, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="must rise from 0 to seqlen 5"):
        attention(inputs["q"], inputs["q"], inputs["q"], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "fits", lambda q: True)
    q = torch.zeros(1, 5, 3, 4)
    with pytest.raises(ImportError, match="needs flash-attn: see requirements-gpu.txt"):
        attention(q, q, q, backend="flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize(("seqlen", "seqlen_k"), SHAPES[:-1])
def test_on_a_gpu(backend: str, seqlen: int, seqlen_k: int) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    half = {name: t.bfloat16() for name, t in make_inputs(2, seqlen, seqlen_k, head_dim=64).items()}
    got = outputs_and_gradients({name: t.cuda() for name, t in half.items()}, backend=backend)
    assert_close(got, reference(half), 2**-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_documents_on_a_gpu(backend: str) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    cu_seqlens = torch.tensor([0, 1, 40, 40, 75, 140], dtype=torch.int32)
    half = {name: t.bfloat16() for name, t in make_inputs(1, 140, 140, head_dim=64).items()}
    on_gpu = {name: t.cuda() for name, t in half.items()}
    got = outputs_and_gradients(on_gpu, backend=backend, cu_seqlens=cu_seqlens.cuda())
    assert_close(got, reference(half, cu_seqlens=cu_seqlens), 2**-6)

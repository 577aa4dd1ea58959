"""Gated linear attention: every backend that runs here against autograd on the float64 reference."""

import importlib.util
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gla import fla, gla

STREAMS = ("q", "k", "v", "log_decay")


def make_inputs(
    batch: int, seqlen: int, n_head: int = 2, d_k: int = 9, d_v: int = 13, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "q": draw(batch, seqlen, n_head, d_k),
        "k": draw(batch, seqlen, n_head, d_k),
        "v": draw(batch, seqlen, n_head, d_v),
        "log_decay": F.logsigmoid(draw(batch, seqlen, n_head, d_k)) / 4,
        "initial_state": draw(batch, n_head, d_k, d_v),
    }


def single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() for name, t in inputs.items()}


def outputs_and_gradients(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """out, the final state, and the gradient of every input through random cotangents of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, state = gla(**leaves, return_final_state=True, **options)
    gradients = torch.autograd.grad(random_loss(out, state), list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, gradients, strict=True))


def random_loss(out: Tensor, state: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    # Cotangents that bf16 holds exactly: autograd hands them back in out's dtype.
    a, b = (torch.randn(t.shape, generator=generator).bfloat16().to(t.device).double() for t in (out, state))
    return (out.double() * a).sum() + (state.double() * b).sum()


def reference(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    wide = {name: t.double() for name, t in inputs.items()}
    return outputs_and_gradients(wide, backend="reference", **options)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 1e-30) -> None:
    """Relative to the largest value of each tensor, so that sums which cancel are judged fairly; NaN fails."""
    for name, expected in want.items():
        if expected.numel():
            scale = expected.abs().max().clamp(min=floor)
            error = ((got[name].cpu().double() - expected.double()).abs() / scale).max()
            assert error <= tolerance, f"{name}: {error:.2e}"


def test_reference_is_the_papers_recurrence() -> None:
    """Written out with plain indices."""
    x = make_inputs(1, 3, 2, 2, 3)
    out, state = gla(**x, return_final_state=True, backend="reference")
    for h in range(2):
        s = x["initial_state"][0, h].clone()
        for t in range(3):
            for i in range(2):
                for j in range(3):
                    s[i, j] = x["log_decay"][0, t, h, i].exp() * s[i, j] + x["k"][0, t, h, i] * x["v"][0, t, h, j]
            torch.testing.assert_close(out[0, t, h], 2**-0.5 * (x["q"][0, t, h] @ s))
        torch.testing.assert_close(state[0, h], s)


# A token, a few, a whole chunk of 64, one more, several; heads as narrow as can be; keys wider than values.
@pytest.mark.parametrize(
    ("seqlen", "d_k", "d_v"), [(1, 9, 13), (2, 9, 13), (15, 8, 4), (64, 9, 13), (65, 1, 1), (200, 16, 32), (333, 9, 13)]
)
def test_float64_matches_autograd(seqlen: int, d_k: int, d_v: int, poison_buffers: None) -> None:
    inputs = make_inputs(2, seqlen, 2, d_k, d_v)
    assert_close(outputs_and_gradients(inputs, backend="chunked"), reference(inputs), 1e-12)


@pytest.mark.parametrize("seqlen", [1, 17, 200])
def test_float32_and_bfloat16_stay_near_float64(seqlen: int) -> None:
    inputs = single(make_inputs(2, seqlen))
    assert_close(outputs_and_gradients(inputs), reference(inputs), 5e-6)

    half = inputs | {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    got, want = outputs_and_gradients(half), reference(half)
    assert {got[name].dtype for name in ("out", "q", "k", "v")} == {torch.bfloat16}
    assert {got[name].dtype for name in ("state", "log_decay", "initial_state")} == {torch.float32}
    assert_close(got, want, 2**-8)  # one rounding to bf16 of the result
    assert_close({"state": got["state"]}, {"state": want["state"]}, 5e-6)  # the state never is bf16


@pytest.mark.parametrize("decay", [0.0, -1e-6, -1.0, -50.0, -1e4, -torch.inf])
@pytest.mark.parametrize("keys", [1.0, 1e4])
def test_extreme_decays_and_keys(decay: float, keys: float) -> None:
    inputs = make_inputs(1, 150)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], decay)
    inputs["k"] *= keys
    inputs = single(inputs)
    got, want = outputs_and_gradients(inputs), reference(inputs)
    assert all(t.isfinite().all() for t in got.values())
    assert_close(got, want, 1e-5)


def test_a_reset_leaves_the_tokens_after_it_their_digits() -> None:
    """Differences of sums of log decays would lose 3e-4 of what is remembered after a few tokens at −800."""
    inputs = make_inputs(1, 128)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1e-3)
    inputs["log_decay"][:, ::9, :, ::2] = -800.0
    inputs = single(inputs)
    assert_close(outputs_and_gradients(inputs), reference(inputs), 2e-6)


@pytest.mark.parametrize("batch", [2, 0])
def test_no_tokens_at_all(batch: int) -> None:
    inputs = {name: t.requires_grad_() for name, t in make_inputs(batch, 0).items()}
    out, state = gla(**inputs, return_final_state=True)
    assert out.shape == (batch, 0, 2, 13)
    torch.testing.assert_close(state, inputs["initial_state"], rtol=0, atol=0)
    state.sum().backward()
    assert inputs["initial_state"].grad.eq(1).all()


@pytest.mark.parametrize("used", [0, 1])
def test_without_a_state_and_with_one_output(used: int) -> None:
    inputs = {name: t for name, t in make_inputs(2, 70).items() if name in STREAMS}
    gradients = []
    for backend in ("chunked", "reference"):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        loss = gla(**leaves, return_final_state=True, backend=backend)[used].square().sum()
        gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-10, atol=1e-10)


def test_split_sequence_equals_whole() -> None:
    inputs = make_inputs(2, 100)
    whole = outputs_and_gradients(inputs)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    state, outs = leaves["initial_state"], []
    for start, end in pairwise([0, 1, 45, 100]):
        part = {name: leaves[name][:, start:end] for name in STREAMS}
        out, state = gla(**part, initial_state=state, return_final_state=True)
        outs.append(out)
    out = torch.cat(outs, 1)
    gradients = torch.autograd.grad(random_loss(out, state), list(leaves.values()))
    assert_close({"out": out, "state": state} | dict(zip(leaves, gradients, strict=True)), whole, 1e-13)


@pytest.mark.parametrize("bounds", [[0, 1, 40, 40, 75, 240], [0, 64, 192]])  # one token, an empty one; whole chunks
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_documents_equal_separate_ones(bounds: list[int], with_state: bool, poison_buffers: None) -> None:
    inputs = make_inputs(1, bounds[-1])
    inputs["initial_state"] = make_inputs(len(bounds) - 1, 1, seed=1)["initial_state"]
    if not with_state:
        del inputs["initial_state"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = outputs_and_gradients(inputs, cu_seqlens=cu_seqlens)
    assert_close(got, reference(inputs, cu_seqlens=cu_seqlens), 1e-12)
    for i, (start, end) in enumerate(pairwise(bounds)):
        alone = {name: inputs[name][:, start:end] for name in STREAMS}
        if with_state:
            alone["initial_state"] = inputs["initial_state"][i : i + 1]
        out, state = gla(**alone, return_final_state=True, backend="reference")
        torch.testing.assert_close(got["out"][:, start:end], out)
        torch.testing.assert_close(got["state"][i : i + 1], state)


def test_no_gradient_crosses_a_document_boundary() -> None:
    inputs = {name: t.requires_grad_() for name, t in make_inputs(1, 80).items() if name in STREAMS}
    out = gla(**inputs, cu_seqlens=torch.tensor([0, 33, 80], dtype=torch.int32))
    out[:, 33:].sum().backward()
    for name in STREAMS:
        assert torch.count_nonzero(inputs[name].grad[:, :33]) == 0
        assert torch.count_nonzero(inputs[name].grad[:, 33:]) > 0


def test_views_and_cotangents_of_any_layout() -> None:
    inputs = make_inputs(2, 50)
    views = {name: t.transpose(-1, -2).contiguous().transpose(-1, -2) for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in views.values())
    assert_close(outputs_and_gradients(views), reference(inputs), 1e-12)
    ones = torch.ones(1, dtype=torch.float64).expand(2, 50, 2, 13)
    got, want = (
        torch.autograd.grad(gla(**leaves, backend=backend), list(leaves.values()), ones)
        for backend in ("chunked", "reference")
        for leaves in [{name: t.detach().requires_grad_() for name, t in inputs.items()}]
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seqlen", [1, 70])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_does_not_round(backend: str, seqlen: int) -> None:
    inputs = single(make_inputs(2, seqlen))
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(inputs, backend=backend)
    assert_close(got, reference(inputs), 5e-6)


def test_nan_is_not_hidden_and_stays_in_its_document() -> None:
    cu_seqlens = torch.tensor([0, 20, 90], dtype=torch.int32)
    for name in STREAMS:
        inputs = {key: t for key, t in single(make_inputs(1, 90)).items() if key in STREAMS}
        inputs[name][0, 3] = float("nan")
        out = gla(**inputs, cu_seqlens=cu_seqlens)
        assert out[0, 3].isnan().all(), name
        assert out[0, 20:].isfinite().all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend must be one of"),
        ({"q": torch.zeros(2, 5, 8)}, r"q must be \(batch, seqlen, n_head, d_k\), got shape \(2, 5, 8\)"),
        ({"v": torch.zeros(2, 5, 8)}, r"v must be \(batch, seqlen, n_head, d_v\)"),
        ({"k": torch.zeros(2, 5, 2, 8)}, r"k must have shape \(2, 5, 2, 9\), got \(2, 5, 2, 8\)"),
        ({"v": torch.zeros(2, 5, 1, 13)}, r"v must have shape \(2, 5, 2, 13\)"),
        ({"log_decay": torch.zeros(2, 5, 2, 1)}, r"log_decay must have shape \(2, 5, 2, 9\)"),
        ({"k": torch.zeros(2, 5, 2, 9, device="meta")}, "k must be on q's device, cpu, got meta"),
        ({"initial_state": torch.zeros(2, 2, 13, 9)}, r"initial_state must have shape \(2, 2, 9, 13\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "into a batch of 1, got batch 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be int32"),
        ({"backend": "fla"}, "'fla' needs fp32, bf16 or fp16 on a GPU, q is torch.float64 on cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gla(**{**make_inputs(2, 5), **change})


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5]])
def test_cu_seqlens_must_cover_the_row(bounds: list[int]) -> None:
    inputs = {name: t for name, t in make_inputs(1, 5).items() if name in STREAMS}
    with pytest.raises(ValueError, match="must rise from 0 to seqlen 5"):
        gla(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_fla_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "fits", lambda q: True)
    with pytest.raises(ImportError, match="needs flash-linear-attention: see requirements-gpu.txt"):
        gla(**make_inputs(2, 5), backend="fla")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "fla"])
def test_on_a_gpu(backend: str, packed: bool) -> None:
    if backend == "fla":
        pytest.importorskip("fla")
    inputs = single(make_inputs(1 if packed else 2, 200, 2, 32, 64))
    options: dict[str, Tensor] = {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 1, 64, 200], dtype=torch.int32)
        inputs["initial_state"] = single(make_inputs(3, 1, 2, 32, 64))["initial_state"]
    half = inputs | {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    on_gpu, options_there = ({name: t.cuda() for name, t in ts.items()} for ts in (half, options))
    # flash-linear-attention keeps the states between chunks in bf16.
    tolerance = 2**-5 if backend == "fla" else 2**-8
    assert_close(outputs_and_gradients(on_gpu, backend=backend, **options_there), reference(half, **options), tolerance)

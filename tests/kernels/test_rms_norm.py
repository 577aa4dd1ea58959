"""Outputs and gradients against float64 autograd of the definition."""

import shutil

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import cpu, rms_norm

EPS = 1e-5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-8}


pytestmark = pytest.mark.usefixtures("poison_buffers")


@pytest.fixture(params=["cpp", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "load_library", lambda source: None)
    return request.param


def expected(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = x + residual
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight, hidden


def make(shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, residual; leaves that require gradients."""
    torch.manual_seed(sum(shape))
    parameters = torch.promote_types(dtype, torch.float32)
    shapes = [(shape, dtype), (shape[-1:], parameters), (shape, residual)]
    return tuple(torch.randn(s, dtype=d, requires_grad=True) for s, d in shapes)


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    seeds = [
        torch.cos(torch.arange(o.numel()).double()).mul(scale).view(o.shape).bfloat16().to(o.dtype) for o in outputs
    ]
    return torch.autograd.grad(outputs, inputs, seeds)


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_cpp_builds() -> None:
    """Or the tests below would try the fallback twice."""
    assert cpu.load_library(cpu.SOURCE) is not None


@pytest.mark.parametrize("shape", [(37,), (1, 3), (3, 5, 37), (2, 129, 256), (1000, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_residual(shape: tuple[int, ...], dtype: torch.dtype, engine: str) -> None:
    x, weight, _ = make(shape, dtype, dtype)
    out = rms_norm(x, weight, eps=EPS)
    dx, dweight = gradients((out,), (x, weight))
    assert out.dtype == dx.dtype == dtype and dweight.dtype == weight.dtype

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    exact, _ = expected(x64, weight64, torch.zeros_like(x64))
    exact_dx, exact_dweight = gradients((exact,), (x64, weight64))
    assert_close(out, exact, TOLERANCE[dtype])
    assert_close(dx, exact_dx, TOLERANCE[dtype])
    # Inputs and sums are exact or fp32: bf16 rounds only what is written in bf16.
    assert_close(dweight, exact_dweight, TOLERANCE[weight.dtype])


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_residual(
    dtype: torch.dtype, residual_dtype: torch.dtype, out_dtype: torch.dtype | None, engine: str
) -> None:
    inputs = make((3, 43, 37), dtype, residual_dtype)
    x, weight, residual = inputs
    out, hidden = rms_norm(x, weight, eps=EPS, residual=residual, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype) and hidden.dtype == torch.float32
    actual = gradients((out, hidden), inputs)
    assert [g.dtype for g in actual] == [dtype, torch.float32, residual_dtype]

    doubles = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact_out, exact_hidden = expected(*doubles)
    exact = gradients((exact_out, exact_hidden), doubles)
    assert_close(out, exact_out, TOLERANCE[out.dtype])
    assert_close(hidden, exact_hidden, TOLERANCE[torch.float32])
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, TOLERANCE[a.dtype])


def test_float64_residual(engine: str) -> None:
    inputs = make((4, 37), torch.float64, torch.float64)
    out, hidden = rms_norm(*inputs[:2], eps=EPS, residual=inputs[2])
    exact = expected(*inputs)
    assert_close(out, exact[0], 1e-14)
    assert_close(hidden, exact[1], 1e-14)
    for a, e in zip(gradients((out, hidden), inputs), gradients(exact, inputs), strict=True):
        assert_close(a, e, 1e-13)


def test_gradient_through_one_output_only(engine: str) -> None:
    inputs = make((4, 37), torch.float32, torch.float32)
    x, weight, residual = inputs
    _, hidden = rms_norm(x, weight, residual=residual)
    dx, dweight, dresidual = torch.autograd.grad(hidden.sum(), inputs)
    assert (dx == 1).all() and (dresidual == 1).all() and (dweight == 0).all()

    out, _ = rms_norm(x, weight, residual=residual)
    dx, _, dresidual = gradients((out,), inputs)
    exact = gradients(expected(*inputs)[:1], inputs)
    assert_close(dx, exact[0].double(), 1e-5)
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4, 1e15])
def test_extreme_inputs(scale: float, engine: str) -> None:
    x, weight, _ = make((5, 37), torch.float32, torch.float32)
    x = (x.detach() * scale).requires_grad_()
    out = rms_norm(x, weight, eps=EPS)
    dx, dweight = gradients((out,), (x, weight))
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    exact, _ = expected(x64, weight64, torch.zeros_like(x64))
    exact_dx, exact_dweight = gradients((exact,), (x64, weight64))
    assert_close(out, exact, 1e-5)
    assert_close(dx, exact_dx, 1e-5)
    assert_close(dweight, exact_dweight, 1e-5)


def test_a_nan_stays_in_its_row(engine: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, _ = (t.detach() for t in make((5, 37), dtype, dtype))
        x[2, 7] = float("nan")
        assert rms_norm(x, weight).isnan().all(1).tolist() == [False, False, True, False, False]


def test_any_nan_survives_rounding_to_bf16(engine: str) -> None:
    x, weight, _ = (t.detach() for t in make((5, 37), torch.bfloat16, torch.float32))
    weight[3].view(torch.int32).fill_(0x7FFFFFFF)  # whose rounding would carry into the sign
    out = rms_norm(x, weight)
    assert out[:, 3].isnan().all() and out.isnan().sum() == 5


def test_views(engine: str) -> None:
    _, weight, _ = make((2, 9, 37), torch.float32, torch.float32)
    x, residual = torch.randn(2, 9, 74)[..., :37], torch.randn(9, 2, 37).transpose(0, 1)
    results = []
    for a, r in ((x, residual), (x.contiguous(), residual.contiguous())):
        a, r = a.detach().requires_grad_(), r.detach().requires_grad_()
        out, hidden = rms_norm(a, weight, residual=r)
        seeds = torch.randn(2, 37, 9, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
        results.append((out, hidden, *torch.autograd.grad((out, hidden), (a, r), (seeds, seeds))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows(engine: str) -> None:
    x, weight = torch.zeros(0, 37, requires_grad=True), torch.ones(37, requires_grad=True)
    dx, dweight = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert dx.shape == (0, 37) and (dweight == 0).all()


def test_same_gradients_for_any_number_of_threads() -> None:
    inputs = make((500, 37), torch.float32, torch.float32)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(gradients((rms_norm(*inputs[:2]),), inputs[:2]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"float32 \(2, 8\) and \(7,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(7))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(2, 8\), not \(8,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(8), residual=torch.ones(8))
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.*, not 'gpu'"):
        rms_norm(torch.ones(2, 8), torch.ones(8), backend="gpu")
    with pytest.raises(ValueError, match="backend 'cpu' needs tensors on the CPU, x is on meta"):
        rms_norm(torch.ones(2, 8, device="meta"), torch.ones(8, device="meta"), backend="cpu")


def test_backends_agree() -> None:
    inputs = make((4, 37), torch.float32, torch.bfloat16)
    results = []
    for backend in ("reference", "cpu", "auto"):
        outputs = rms_norm(*inputs[:2], residual=inputs[2], backend=backend)
        results.append((*outputs, *gradients(outputs, inputs)))
    for reference, compiled, automatic in zip(*results, strict=True):
        assert torch.equal(compiled, automatic)
        torch.testing.assert_close(compiled, reference, rtol=2**-7, atol=1e-6)

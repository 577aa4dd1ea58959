"""The Triton RMSNorm against float64 autograd of the definition."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import rms_norm
from kernels.rms_norm import triton as module

EPS = 1e-5
# What is left of an exact result: rounding of what is written (the interpreter truncates to bf16), and of fp32 sums.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

pytestmark = pytest.mark.usefixtures("poison_buffers")


@pytest.fixture
def gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("about a GPU's own behaviour")


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of dweight for every 2 or 3 rows."""
    for name, value in {"PARTS": 4, "MIN_ROWS": 2, "MAX_ROWS": 3}.items():
        monkeypatch.setattr(module, name, value)


def expected(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    hidden = x if residual is None else x + residual
    out = hidden / (hidden.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    return (out,) if residual is None else (out, hidden)


def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None):
    result = rms_norm(x, weight, eps=EPS, residual=residual, out_dtype=out_dtype, backend="triton")
    return (result,) if residual is None else result


def make(shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype | None = None) -> list[Tensor]:
    """x, weight and, if it has a dtype, a residual, on the CPU."""
    generator = torch.Generator().manual_seed(sum(shape))
    kinds = [(shape, dtype), (shape[-1:], torch.float32), (shape, residual)]
    return [torch.randn(s, generator=generator).to(d) for s, d in kinds if d is not None]


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """For gradients of the outputs that are the same for every dtype (they fit bf16) and device."""
    seeds = [torch.cos(torch.arange(o.numel()) + 0.5).view(o.shape).bfloat16().to(o) for o in outputs]
    return torch.autograd.grad(outputs, inputs, seeds)


def assert_matches_float64(device: str, inputs: list[Tensor], out_dtype: torch.dtype | None = None) -> None:
    """Each error at most the tolerance of the dtype it is written in, relative to the largest value."""
    leaves = [t.to(device).requires_grad_() for t in inputs]
    outputs = ours(*leaves, out_dtype=out_dtype)
    actual = (*outputs, *gradients(outputs, leaves))
    dtypes = [out_dtype or inputs[0].dtype, torch.float32][: len(outputs)] + [t.dtype for t in inputs]
    doubles = [t.double().requires_grad_() for t in inputs]
    exact_outputs = expected(*doubles)
    exact = (*exact_outputs, *gradients(exact_outputs, doubles))
    for i, (a, e, dtype) in enumerate(zip(actual, exact, dtypes, strict=True)):
        assert a.dtype == dtype and a.shape == e.shape, i
        error = (a.detach().cpu().double() - e).abs().max() / e.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], (i, error.item())  # NaN fails


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("shape", [(37,), (1, 3), (3, 5, 37), (2, 4, 64), (13, 2048), (3, 4096)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_residual(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches_float64(device, make(shape, dtype))


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize(
    ("dtype", "residual", "out_dtype"), product(TOLERANCE, TOLERANCE, (None, torch.float32, torch.bfloat16)), ids=str
)
def test_with_residual(device: str, dtype: torch.dtype, residual: torch.dtype, out_dtype: torch.dtype | None) -> None:
    assert_matches_float64(device, make((3, 4, 37), dtype, residual), out_dtype)


@pytest.mark.parametrize("rows", [1, module.MIN_ROWS + 1])
def test_one_channel(device: str, rows: int) -> None:
    """Without the carry dx would be next to nothing, a difference of equals."""
    assert_matches_float64(device, make((rows, 1), torch.float32, torch.float32))


@pytest.mark.parametrize("rows", [1, module.MIN_ROWS + 1])
def test_parts_as_shipped(device: str, rows: int) -> None:
    assert_matches_float64(device, make((rows, 100), torch.bfloat16, torch.float32))


def test_the_widest_row(device: str) -> None:
    assert_matches_float64(device, make((2, 16384), torch.bfloat16, torch.float32))
    with pytest.raises(ValueError, match="a d_model from 1 to 32768, not 32769"):
        rms_norm(torch.ones(1, 32769, device=device), torch.ones(32769, device=device), backend="triton")


def test_weight_in_low_precision(device: str) -> None:
    x, weight = make((3, 37), torch.bfloat16)
    assert_matches_float64(device, [x, weight.bfloat16()])


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_only(device: str, output: int) -> None:
    inputs = make((4, 37), torch.float32, torch.float32)
    results = []
    for where, dtype, function in ((device, torch.float32, ours), ("cpu", torch.float64, expected)):
        leaves = [t.to(where, dtype).requires_grad_() for t in inputs]
        # .sum(): a gradient expanded from one number
        loss = function(*leaves)[output].sum() + 0.0 * leaves[1].sum()
        results.append(torch.autograd.grad(loss, leaves))
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4, 1e15])
def test_extreme_inputs(device: str, scale: float) -> None:
    x, weight = make((5, 37), torch.float32)
    assert_matches_float64(device, [x * scale, weight])


def test_a_nan_stays_in_its_row(device: str) -> None:
    x, weight, residual = (t.to(device).requires_grad_() for t in make((5, 37), torch.bfloat16, torch.float32))
    with torch.no_grad():
        x[2, 7] = float("nan")
    outputs = ours(x, weight, residual)
    dx, dweight, dresidual = gradients(outputs, [x, weight, residual])
    for rows in (outputs[0], dx, dresidual):
        assert rows.isnan().all(1).tolist() == [False, False, True, False, False]
        assert rows.isnan().sum() == 37
    assert dweight.isnan().all()


@pytest.mark.parametrize("residual", [None, torch.float32])
def test_views_equal_contiguous_tensors(device: str, residual: torch.dtype | None) -> None:
    inputs = [t.to(device) for t in make((2, 9, 37), torch.bfloat16, residual)]
    views = [
        torch.cat([inputs[0]] * 2, -1)[..., 37:],  # rows apart
        torch.stack([inputs[1]] * 2, 1)[:, 0],  # channels apart
        *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs[2:]),  # no stride from row to row
    ]
    results = []
    for tensors in (inputs, views):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = ours(*leaves)
        seeds = [torch.sin(torch.arange(o.numel(), device=device)).view(37, 2, 9).permute(1, 2, 0) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, [s.to(o) for s, o in zip(seeds, outputs, strict=True)])
        results.append((*outputs, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows(device: str) -> None:
    x, weight = torch.zeros(0, 37, device=device).requires_grad_(), torch.ones(37, device=device).requires_grad_()
    dx, dweight = torch.autograd.grad(ours(x, weight)[0].sum(), (x, weight))
    assert dx.shape == (0, 37) and (dweight == 0).all()


def test_the_same_bits_again(device: str) -> None:
    leaves = [t.to(device).requires_grad_() for t in make((20, 37), torch.bfloat16, torch.float32)]
    first, second = (gradients(ours(*leaves), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_refused(device: str) -> None:
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(TypeError, match="backend 'triton' computes in fp32; for float64"):
        rms_norm(x.double(), weight, backend="triton")
    with pytest.raises(TypeError, match="for float64"):
        rms_norm(x, weight, residual=x.double(), backend="triton")


# ---- on a GPU only ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("gpu")
def test_nothing_waits_for_the_gpu() -> None:
    leaves = [t.cuda().requires_grad_() for t in make((20, 37), torch.bfloat16, torch.float32)]
    seeds = [torch.ones(20, 37, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = rms_norm(leaves[0], leaves[1], residual=leaves[2])
        torch.autograd.grad(outputs, leaves, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("gpu")
def test_offsets_beyond_int32() -> None:
    rows, d_model = 2**31 // 16384 + 40, 16384
    x = torch.zeros(rows, d_model, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.randn(d_model, device="cuda")
    with torch.no_grad():
        x[-40:].normal_()
    out = rms_norm(x, weight)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    tail = x[-40:].detach().requires_grad_()
    expected_out = rms_norm(tail, weight, backend="reference")
    (expected_dx,) = torch.autograd.grad(expected_out, tail, torch.ones_like(expected_out))
    torch.testing.assert_close(out[-40:], expected_out)
    torch.testing.assert_close(dx[-40:], expected_dx, rtol=2**-7, atol=2**-7)

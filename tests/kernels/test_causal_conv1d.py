"""Outputs and gradients against float64 autograd of F.conv1d, applied to one document at a time."""

import shutil
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, cpu

D_INNER = 37  # no multiple of a vector
# What is left of an exact result: rounding of the output, and of fp32 sums over up to 2000 rows.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}


pytestmark = pytest.mark.usefixtures("poison_buffers")


@pytest.fixture(params=["compiler", "no-compiler"])
def with_and_without_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no-compiler":
        monkeypatch.setattr(cpu, "load_library", lambda source: None)


@pytest.fixture(params=["reference", "cpu", "cpu-without-compiler"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu-without-compiler":
        monkeypatch.setattr(cpu, "load_library", lambda source: None)
    return request.param.removesuffix("-without-compiler")


def expected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    bounds: list[int] | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """(out, final state) by F.conv1d."""
    outs, states = [], []
    sequences = x.unbind() if bounds is None else [x[0, a:b] for a, b in pairwise(bounds)]
    for rows, state in zip(sequences, initial_state.unbind(), strict=True):
        inputs = torch.cat([state, rows.t()], dim=1)
        if len(rows):
            out = functional.conv1d(inputs[None], weight[:, None], bias, groups=len(weight))
            outs.append(out[0].t())
        states.append(inputs[:, len(rows) :])
    out = torch.stack(outs) if bounds is None else torch.cat(outs)[None]
    return functional.silu(out) if activation else out, torch.stack(states)


def make_inputs(
    seqlen: int, dtype: torch.dtype, *, batch: int = 2, n_seq: int | None = None, d_conv: int = 4
) -> tuple[Tensor, ...]:
    """x, weight, bias, initial_state; leaves that require gradients."""
    torch.manual_seed(seqlen)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [
        ((batch, seqlen, D_INNER), dtype),
        ((D_INNER, d_conv), parameters),
        ((D_INNER,), parameters),
        ((n_seq or batch, D_INNER, d_conv - 1), dtype),
    ]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape, dtype in shapes)


def run(function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(out, final_state) and the gradients of inputs, for fixed random ones of both outputs."""
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16().to(o.dtype) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, seeds)


def assert_close(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, a, e in zip(["out", "state", "dx", "dw", "db", "dstate"], actual, exact, strict=True):
        assert a.shape == e.shape, name
        scale = e.abs().max().clamp(min=1e-30) if e.numel() else 1.0
        error = (a.double() - e).abs() / scale
        assert error.numel() == 0 or error.max() <= TOLERANCE[dtype], (name, error.max().item())


def assert_matches_float64(inputs: tuple[Tensor, ...], backend: str, bounds: list[int] | None = None) -> None:
    x, *_ = inputs
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=state,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    actual = run(ours, *inputs)
    assert actual[0].dtype == actual[1].dtype == actual[2].dtype == x.dtype
    doubles = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = run(lambda *arguments: expected(*arguments, bounds), *doubles)
    assert_close(actual, exact, x.dtype)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_cpp_builds() -> None:
    """Or the tests below would try the fallback twice."""
    assert cpu.load_library(cpu.SOURCE) is not None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seqlen", [1, 2, 3, 63, 65, 1000])
def test_outputs_and_gradients(seqlen: int, dtype: torch.dtype, backend: str) -> None:
    assert_matches_float64(make_inputs(seqlen, dtype), backend)


@pytest.mark.parametrize("d_conv", [1, 2, 3, 4, 5])
def test_every_width(d_conv: int, backend: str) -> None:
    assert_matches_float64(make_inputs(7, torch.float32, d_conv=d_conv), backend)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_documents_short_and_empty(dtype: torch.dtype, backend: str) -> None:
    bounds = [0, 0, 1, 3, 3, 40, 43, 43]
    inputs = make_inputs(43, dtype, batch=1, n_seq=len(bounds) - 1)
    assert_matches_float64(inputs, backend, bounds)


def test_only_empty_documents_keep_their_state(backend: str) -> None:
    x, weight, bias, state = make_inputs(0, torch.float32, batch=1, n_seq=2)
    out, final = causal_conv1d(
        x,
        weight,
        bias,
        initial_state=state,
        return_final_state=True,
        cu_seqlens=torch.tensor([0, 0, 0]),
        backend=backend,
    )
    assert out.shape == x.shape and torch.equal(final, state)


def test_nothing_crosses_a_document_boundary(backend: str) -> None:
    x, weight, bias, _ = make_inputs(20, torch.float32, batch=1)
    cu_seqlens = torch.tensor([0, 9, 20])
    out = causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu_seqlens, backend=backend)
    (dx,) = torch.autograd.grad(out[:, 9:].square().sum(), x)
    assert (dx[:, :9] == 0).all() and (dx[:, 9:] != 0).all()


def test_no_bias_no_activation_no_state(backend: str) -> None:
    x, weight, _, _ = make_inputs(11, torch.float64)
    out = causal_conv1d(x, weight, backend=backend)
    exact, _ = expected(x, weight, None, x.new_zeros(2, D_INNER, 3), activation=None)
    torch.testing.assert_close(out, exact)
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    exact_dx, exact_dweight = torch.autograd.grad(exact.sum(), (x, weight))
    torch.testing.assert_close(dx, exact_dx)
    torch.testing.assert_close(dweight, exact_dweight)


def test_gradient_from_final_state_alone(backend: str) -> None:
    x, weight, bias, state = make_inputs(2, torch.float32)
    _, final = causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True, backend=backend)
    dx, dstate = torch.autograd.grad(final.sum(), (x, state))
    assert (dx == 1).all()
    assert (dstate[..., :2] == 0).all() and (dstate[..., 2] == 1).all()


def test_strided_views(backend: str) -> None:
    _, weight, bias, _ = make_inputs(9, torch.float64)
    both = torch.randn(2, 9, 2 * D_INNER, dtype=torch.float64)
    views = {
        "half of in_proj's output": both[..., D_INNER:],
        "channels first": torch.randn(2, D_INNER, 9, dtype=torch.float64).transpose(1, 2),
        "every other token": torch.randn(2, 18, D_INNER, dtype=torch.float64)[:, ::2],
        "expanded batch": torch.randn(9, D_INNER, dtype=torch.float64).expand(2, -1, -1),
    }
    for name, view in views.items():
        results = []
        for x in (view, view.contiguous()):
            x = x.detach().requires_grad_()
            out = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
            seed = torch.cos(torch.arange(out.numel()).double()).view(D_INNER, 2, 9).permute(1, 2, 0)
            results.append((out, *torch.autograd.grad(out, (x, weight, bias), seed)))
        for strided, contiguous in zip(*results, strict=True):
            torch.testing.assert_close(strided, contiguous, msg=name)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_inputs(scale: float, backend: str) -> None:
    x, *rest = make_inputs(33, torch.float32)
    assert_matches_float64(((x.detach() * scale).requires_grad_(), *rest), backend)


def test_a_nan_shows_in_its_window_only(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, _ = (t.detach() for t in make_inputs(12, dtype))
        x[0, 5, 3] = float("nan")
        out = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
        assert out.isnan().nonzero().tolist() == [[0, t, 3] for t in range(5, 9)]


def test_any_nan_survives_rounding_to_bf16(backend: str) -> None:
    x, weight, bias, _ = (t.detach() for t in make_inputs(5, torch.bfloat16))
    weight[3].view(torch.int32).fill_(0x7FFFFFFF)  # whose rounding would carry into the sign
    out = causal_conv1d(x, weight, bias, backend=backend)
    assert out[..., 3].isnan().all() and out.isnan().sum() == 10


@pytest.mark.parametrize("cut", [1, 2, 30, 64])
def test_split_sequence_equals_whole(cut: int, backend: str) -> None:
    def split(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *parameters, state = rest
        outs = []
        for part in x.split([cut, 65 - cut], dim=1):
            out, state = causal_conv1d(
                part,
                *parameters,
                activation="silu",
                initial_state=state,
                return_final_state=True,
                backend=backend,
            )
            outs.append(out)
        return torch.cat(outs, dim=1), state

    inputs = make_inputs(65, torch.float64)
    assert_close(run(split, *inputs), run(expected, *inputs), torch.float64)


@pytest.mark.usefixtures("with_and_without_compiler")
@pytest.mark.parametrize("slots_first", [False, True])  # in memory: exports keep (batch, d_conv - 1, d_inner)
@pytest.mark.parametrize("d_conv", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_step_equals_whole(dtype: torch.dtype, d_conv: int, slots_first: bool) -> None:
    x, weight, bias, state = (t.detach() for t in make_inputs(9, dtype, d_conv=d_conv))
    if slots_first:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    whole, final = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, return_final_state=True)
    steps = [causal_conv1d_step(state, t, weight, bias, activation="silu") for t in x.unbind(1)]
    out = torch.stack(steps, dim=1)
    assert out.dtype == dtype and torch.equal(state, final)
    torch.testing.assert_close(out, whole)


@pytest.mark.usefixtures("with_and_without_compiler")
def test_step_with_state_indices() -> None:
    x, weight, bias, _ = (t.detach() for t in make_inputs(1, torch.float32, batch=4))
    states = torch.randn(6, D_INNER, 3)
    before, rows = states.clone(), torch.tensor([4, -1, 0, -1])
    out = causal_conv1d_step(states, x[:, 0], weight, bias, state_indices=rows)
    alone = before[[4, 0]]
    expected_out = causal_conv1d_step(alone, x[[0, 2], 0], weight, bias)
    assert torch.equal(out[[0, 2]], expected_out) and (out[[1, 3]] == 0).all()
    assert torch.equal(states[[4, 0]], alone)
    assert torch.equal(states[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    with pytest.raises(ValueError, match="state_indices must be below 6"):
        causal_conv1d_step(states, x[:, 0], weight, bias, state_indices=torch.tensor([0, 1, 2, 6]))


def test_same_gradients_for_any_number_of_threads() -> None:
    inputs = make_inputs(65, torch.float32)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(run(lambda *i: causal_conv1d(*i[:3], return_final_state=True), *inputs[:3]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5, 4)}, r"weight must be .* \(37, ≥ 1\), not \(5, 4\)"),
        ({"bias": torch.ones(36)}, r"bias must have shape \(37,\), not \(36,\)"),
        ({"activation": "gelu"}, "activation must be None or 'silu', not 'gelu'"),
        ({"backend": "gpu"}, "backend must be one of .*'triton'.*, not 'gpu'"),
        ({"x": torch.ones(2, 37)}, r"x must be floating point with 3 dimensions"),
        ({"initial_state": torch.ones(2, 37, 4)}, r"initial_state must have shape \(1, 37, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"from 0 to seqlen = 6, not be \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"not be \[0, 4, 2, 6\]"),
        ({"x": torch.ones(2, 6, 37), "cu_seqlens": torch.tensor([0, 6])}, "x has batch 2"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be int \(n_seq \+ 1,\), not torch.float32 \(2,\)"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"x": torch.ones(1, 6, 37), "weight": torch.ones(37, 4)} | changes
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)


def test_cpu_backend_refuses_other_devices() -> None:
    meta = torch.ones(1, 6, 37, device="meta")
    with pytest.raises(ValueError, match="x is on meta"):
        causal_conv1d(meta, torch.ones(37, 4, device="meta"), backend="cpu")

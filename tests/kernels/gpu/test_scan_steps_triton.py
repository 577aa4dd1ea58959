"""The decode steps in Triton against the float64 step."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.longhorn_scan import longhorn_step
from kernels.longhorn_scan.triton import triton_step as longhorn_triton
from kernels.selective_scan import selective_step
from kernels.selective_scan.triton import triton_step as selective_triton

OPTIONAL = ("D", "dt_bias", "z")


def make_inputs(scan: str, batch: int, d_inner: int, d_state: int) -> dict[str, Tensor]:
    """A token per row, on the CPU; rows are named by the scan."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("u", "dt", "z"), (batch, d_inner)) | {"D": (d_inner,), "dt_bias": (d_inner,)}
    shapes |= dict.fromkeys(("q", "k") if scan == "longhorn" else ("B", "C"), (batch, d_state))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if scan == "selective":
        inputs["A"] = -torch.rand(d_inner, d_state, generator=generator) - 0.1
    return inputs


def run(scan: str, state: Tensor, inputs: dict[str, Tensor], indices: Tensor | None, update: str) -> Tensor:
    names = ("u", "dt", "q", "k") if scan == "longhorn" else ("u", "dt", "A", "B", "C")
    given = [inputs.get(name) for name in (*names, *OPTIONAL)]
    if scan == "longhorn":
        return longhorn_triton(state, *given, indices, update)
    return selective_triton(state, *given, indices)


STEPS: dict[str, Callable[..., Tensor]] = {
    "longhorn diagonal": longhorn_step,
    "longhorn exact": partial(longhorn_step, update="exact"),
    "selective": selective_step,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_inner", "d_state", "absent"), [(70, 16, ()), (19, 5, ("z",)), (1, 1, OPTIONAL)])
def test_matches_the_float64_step(
    name: str, dtype: torch.dtype, d_inner: int, d_state: int, absent: tuple[str, ...], device: str
) -> None:
    scan, _, update = name.partition(" ")
    inputs = make_inputs(scan, 3, d_inner, d_state)
    streams = {k: t.to(dtype) for k, t in inputs.items() if t.dim() == 2 and k not in ("A", *absent)}
    inputs = {k: streams.get(k, t) for k, t in inputs.items() if k not in absent}
    state = torch.randn(3, d_inner, d_state)

    exact = state.double()
    want = STEPS[name](exact, **{k: t.double() for k, t in inputs.items()})
    found = state.to(device)
    out = run(scan, found, {k: t.to(device) for k, t in inputs.items()}, None, update)
    assert out.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-6, atol=2e-6)
    # The rounding of the result; the interpreter truncates to bf16.
    tolerance = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", STEPS)
def test_state_indices(name: str, device: str, poison_buffers: None) -> None:
    scan, _, update = name.partition(" ")
    inputs = {k: t.to(device) for k, t in make_inputs(scan, 3, 37, 16).items()}
    pool = torch.randn(5, 37, 16).to(device)
    before, alone = pool.clone(), pool[[4, 0, 2]].clone()
    want = run(scan, alone, inputs, None, update)
    out = run(scan, pool, inputs, torch.tensor([4, -1, 2], device=device), update)
    assert torch.equal(out[[0, 2]], want[[0, 2]])
    assert not out[1].any()
    assert torch.equal(pool[[4, 2]], alone[[0, 2]])
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def test_views_and_strided_states(device: str) -> None:
    inputs = {k: t.to(device) for k, t in make_inputs("longhorn", 3, 37, 16).items()}
    state = torch.randn(3, 37, 16).to(device)
    before, strided = state.clone(), state.mT.contiguous().mT
    want = run("longhorn", state, inputs, None, "diagonal")
    views = dict(inputs)
    views["u"], views["z"] = torch.cat([inputs["u"], inputs["z"]], -1).chunk(2, -1)
    views["dt"] = inputs["dt"].mT.contiguous().mT
    assert not any(views[name].is_contiguous() for name in ("u", "z", "dt"))
    assert torch.equal(run("longhorn", before.clone(), views, None, "diagonal"), want)
    # Another layout of the state adds up in another order.
    torch.testing.assert_close(run("longhorn", strided, views, None, "diagonal"), want, rtol=2e-6, atol=2e-6)
    assert torch.equal(strided, state)


def test_fp64_states_are_refused(device: str) -> None:
    inputs = {k: t.to(device) for k, t in make_inputs("longhorn", 1, 3, 2).items()}
    with pytest.raises(TypeError, match="keeps its state in fp32, not torch.float64"):
        run("longhorn", torch.zeros(1, 3, 2, dtype=torch.float64, device=device), inputs, None, "diagonal")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_holds_a_step(name: str) -> None:
    scan, _, update = name.partition(" ")
    inputs = {k: t.cuda() for k, t in make_inputs(scan, 2, 64, 16).items()}
    state = torch.zeros(2, 64, 16, device="cuda")
    run(scan, state, inputs, None, update)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(scan, state, inputs, None, update)
    state.zero_()
    graph.replay()
    again = torch.zeros_like(state)
    assert torch.equal(out, run(scan, again, inputs, None, update))
    assert torch.equal(state, again)

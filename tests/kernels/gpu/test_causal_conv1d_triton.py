"""The Triton convolution against float64 autograd of the reference, and its decoding step against the reference's."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.causal_conv1d import triton as module
from kernels.causal_conv1d.reference import causal_conv1d_step_reference

D_INNER = 19  # no multiple of a vector
# What is left of an exact result: rounding of the output (the interpreter truncates to bf16), and of fp32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
PACKED = [0, 0, 1, 3, 3, 9, 18, 22, 40, 43, 43]  # documents empty, short, and with ends at those of chunks and spans

pytestmark = pytest.mark.usefixtures("poison_buffers")


@pytest.fixture
def gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("about a GPU's own behaviour")


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that small inputs have several of each kind; at d_conv 4, 9 tokens of a span are its program's own."""
    monkeypatch.setattr(module, "FORWARD_CHUNK", 4)
    monkeypatch.setattr(module, "BACKWARD_CHUNK_BYTES", 8)
    monkeypatch.setattr(module, "SPAN", 12)
    monkeypatch.setattr(module, "_forward_block", lambda dtype, K: {"BLOCK_D": 16, "num_warps": 1})
    monkeypatch.setattr(module, "_backward_block", lambda K: {"BLOCK_D": 16, "num_warps": 1})


def make_inputs(
    seqlen: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    n_seq: int | None = None,
    d_inner: int = D_INNER,
    d_conv: int = 4,
) -> dict[str, Tensor]:
    """Every tensor that a gradient reaches, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seqlen + d_inner)
    shapes = {
        "x": (batch, seqlen, d_inner),
        "weight": (d_inner, d_conv),
        "bias": (d_inner,),
        "initial_state": (n_seq or batch, d_inner, d_conv - 1),
    }
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return inputs | {name: inputs[name].to(dtype) for name in ("x", "initial_state")}


def seeds_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, the same for every dtype (they fit bf16) and device."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]


def run(
    inputs: dict[str, Tensor], bounds: list[int] | None = None, activation: str | None = "silu", **options: str
) -> dict[str, Tensor]:
    """out, final state and every gradient, on the inputs' device."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    x = leaves["x"]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=x.device)
    outputs = causal_conv1d(
        **leaves,
        activation=activation,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        **({"backend": "triton"} | options),
    )
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds_like(outputs))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": outputs[0].detach(), "final_state": outputs[1].detach()} | named


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in inputs.items()}


def assert_matches_float64(
    device: str, inputs: dict[str, Tensor], bounds: list[int] | None = None, activation: str | None = "silu"
) -> None:
    """Each error at most the tolerance of what it is an error of, relative to the largest value."""
    actual = run(on(device, inputs), bounds, activation)
    exact = run({name: t.double() for name, t in inputs.items()}, bounds, activation, backend="reference")
    for name, want in exact.items():
        source = inputs.get(name.removeprefix("d"), inputs["x"])
        assert actual[name].dtype == source.dtype and actual[name].shape == want.shape, name
        if want.numel():
            error = (actual[name].cpu().double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
            assert error <= TOLERANCE[source.dtype], (name, error.item())  # NaN fails


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("batch", "seqlen"), [(2, 1), (3, 2), (2, 9), (1, 12), (2, 25)])
def test_outputs_and_gradients(device: str, batch: int, seqlen: int) -> None:
    assert_matches_float64(device, make_inputs(seqlen, batch=batch))


@pytest.mark.parametrize(("dtype", "d_inner"), [(torch.float32, 129), (torch.bfloat16, 257)])
def test_blocks_as_shipped(device: str, dtype: torch.dtype, d_inner: int) -> None:
    """Two spans, and blocks of channels the last of which has a single one."""
    assert_matches_float64(device, make_inputs(module.SPAN - 2, dtype, d_inner=d_inner))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("d_conv", [1, 2, 3, 5, module.MAX_WIDTH])
def test_every_width(device: str, d_conv: int) -> None:
    assert_matches_float64(device, make_inputs(7, d_conv=d_conv))
    assert_matches_float64(device, make_inputs(16, n_seq=4, d_conv=d_conv), [0, 2, 2, 9, 16])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_documents_short_and_empty(device: str, dtype: torch.dtype) -> None:
    assert_matches_float64(device, make_inputs(43, dtype, n_seq=len(PACKED) - 1), PACKED)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bounds", [None, [0, 2, 3, 12]])
@pytest.mark.parametrize("present", [(), ("bias",), ("initial_state",)])
def test_optional_inputs(
    device: str, present: tuple[str, ...], bounds: list[int] | None, activation: str | None
) -> None:
    inputs = make_inputs(12, n_seq=None if bounds is None else 3)
    inputs = {name: t for name, t in inputs.items() if name in ("x", "weight", *present)}
    assert_matches_float64(device, inputs, bounds, activation)


def test_parameters_in_low_precision(device: str) -> None:
    inputs = make_inputs(9, torch.bfloat16)
    assert_matches_float64(device, inputs | {"weight": inputs["weight"].bfloat16(), "bias": inputs["bias"].half()})


def test_only_empty_documents_keep_their_state(device: str) -> None:
    inputs = make_inputs(0, n_seq=2)
    actual = run(on(device, inputs), [0, 0, 0])
    assert actual["out"].shape == (1, 0, D_INNER)
    assert torch.equal(actual["final_state"].cpu(), inputs["initial_state"])
    (_, seed) = seeds_like((actual["out"], actual["final_state"]))
    assert torch.equal(actual["dinitial_state"], seed)
    assert (actual["dweight"] == 0).all() and (actual["dbias"] == 0).all()


@pytest.mark.usefixtures("blocks")
def test_nothing_crosses_a_document_boundary(device: str) -> None:
    inputs = {name: t.requires_grad_() for name, t in on(device, make_inputs(30, n_seq=3)).items()}
    cu_seqlens = torch.tensor([0, 11, 20, 30], device=device)
    out, final = causal_conv1d(
        **inputs, activation="silu", return_final_state=True, cu_seqlens=cu_seqlens, backend="triton"
    )
    loss = out[:, 11:20].square().sum() + final[1].square().sum()
    dx, dstate = torch.autograd.grad(loss, (inputs["x"], inputs["initial_state"]))
    assert (dx[:, 11:20] != 0).all() and (dx[:, :11] == 0).all() and (dx[:, 20:] == 0).all()
    assert (dstate[1] != 0).all() and (dstate[[0, 2]] == 0).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_from_one_output_alone(device: str, output: int) -> None:
    inputs = make_inputs(14, n_seq=3)
    bounds = [0, 2, 2, 14]
    results = []
    for where, dtype, backend in ((device, torch.float32, "triton"), ("cpu", torch.float64, "reference")):
        leaves = {name: t.to(where, dtype).requires_grad_() for name, t in inputs.items()}
        cu_seqlens = torch.tensor(bounds, device=where)
        outputs = causal_conv1d(**leaves, return_final_state=True, cu_seqlens=cu_seqlens, backend=backend)
        # .sum(): a gradient expanded from one number
        results.append(torch.autograd.grad(outputs[output].sum(), (leaves["x"], leaves["initial_state"])))
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-6, atol=1e-6)


def test_without_final_state(device: str) -> None:
    inputs = on(device, make_inputs(9))
    whole = run(inputs)
    out = causal_conv1d(**inputs, activation="silu", backend="triton")
    assert isinstance(out, Tensor) and torch.equal(out, whole["out"])


@pytest.mark.usefixtures("blocks")
def test_views_equal_contiguous_tensors(device: str) -> None:
    inputs = on(device, make_inputs(5, torch.bfloat16, batch=2))
    x = inputs["x"]
    views = {
        "half of in_proj's output": torch.cat([x, x * 2], -1)[..., :D_INNER],
        "its other half": torch.cat([x * 2, x], -1)[..., D_INNER:],
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.mT.contiguous().mT,
    }
    others = {
        "weight": inputs["weight"].t().contiguous().t(),
        "bias": torch.stack([inputs["bias"]] * 2, 1)[:, 0],
        "initial_state": inputs["initial_state"].mT.contiguous().mT,
    }
    expected = run(inputs)
    for name, view in views.items():
        actual = run({"x": view} | others)
        assert all(torch.equal(actual[key], want) for key, want in expected.items()), name
    expanded = x[:1].expand(2, -1, -1)
    assert torch.equal(run(inputs | {"x": expanded})["dx"], run(inputs | {"x": expanded.contiguous()})["dx"])


@pytest.mark.usefixtures("blocks")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_inputs(device: str, scale: float) -> None:
    inputs = make_inputs(14)
    inputs["x"] *= scale
    assert_matches_float64(device, inputs)


@pytest.mark.usefixtures("blocks")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_nothing_comes_from_past_the_end(device: str) -> None:
    """The convolution after the last token of a document, or of the row, overflows here: no gradient is NaN for it."""
    inputs = make_inputs(9, n_seq=2)
    inputs["x"][0, [0, 8]] = 1e37
    inputs["weight"][:, -2], inputs["weight"][:, -1] = 1e4, 1.0
    assert_matches_float64(device, inputs, [0, 1, 9])


@pytest.mark.usefixtures("blocks")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_reaches_only(device: str, value: float) -> None:
    """In out for a window onwards; in dx for a window on either side, cut off by the document's end."""
    inputs = make_inputs(24, n_seq=2)
    inputs["x"][0, 15, 3] = value  # the last but one of its document, whose weight may turn infinity to a 0
    inputs["weight"].abs_()
    actual = {name: t.cpu() for name, t in run(on(device, inputs), [0, 17, 24]).items()}
    assert (~actual["out"].isfinite()).nonzero().tolist() == [[0, t, 3] for t in (15, 16)]
    spoiled = actual["dx"].isnan().nonzero().tolist()
    assert spoiled == [[0, t, 3] for t in range(12, 17)]
    assert actual["dbias"].isnan().nonzero().tolist() == [[3]]


@pytest.mark.usefixtures("blocks")
def test_the_same_bits_again(device: str) -> None:
    inputs = on(device, make_inputs(20, torch.bfloat16, n_seq=2))
    first, second = run(inputs, [0, 7, 20]), run(inputs, [0, 7, 20])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_steps_equal_the_whole(device: str, d_conv: int, dtype: torch.dtype) -> None:
    inputs = on(device, make_inputs(6, dtype, batch=2, d_conv=d_conv))
    out, final = causal_conv1d(**inputs, activation="silu", return_final_state=True, backend="triton")
    state, weight, bias = inputs["initial_state"], inputs["weight"], inputs["bias"]
    steps = [module.causal_conv1d_step_triton(state, t, weight, bias, None, True) for t in inputs["x"].unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), out, rtol=TOLERANCE[dtype], atol=1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("layout", ["slots last", "slots first", "channels last of a wider cache"])
def test_step_with_state_indices(device: str, layout: str) -> None:
    x, weight, bias, state = make_inputs(1, batch=4).values()
    state = torch.randn(6, D_INNER, 3, generator=torch.Generator().manual_seed(0))
    stored = {
        "slots last": state.clone(),
        "slots first": state.mT.contiguous().mT,
        "channels last of a wider cache": torch.cat([state, state], 1)[:, D_INNER:],
    }[layout].to(device)
    rows = torch.tensor([4, -1, 0, -1], dtype=torch.int32)
    x = torch.cat([x, x], -1)[:, 0, :D_INNER]
    expected = causal_conv1d_step_reference(state, x, weight, bias, rows, False)
    x[rows < 0] = float("nan")  # not read
    arguments = (t.to(device) for t in (x, weight, bias, rows))
    out = module.causal_conv1d_step_triton(stored, *arguments, False)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(stored.cpu(), state) and (out[[1, 3]] == 0).all()


def test_step_lets_a_nan_through(device: str) -> None:
    x, weight, _, state = on(device, make_inputs(1, batch=2)).values()
    state[1, 5, 0] = float("nan")
    out = module.causal_conv1d_step_triton(state, x[:, 0], weight, None, None, True)
    assert out.isnan().nonzero().tolist() == [[1, 5]] and not state.isnan().any()


def test_bad_input_is_named(device: str) -> None:
    x, weight = torch.ones(1, 6, 37, device=device), torch.ones(37, 4, device=device)
    with pytest.raises(TypeError, match="backend 'triton' computes in fp32; for float64"):
        causal_conv1d(x.double(), weight.double(), backend="triton")
    with pytest.raises(ValueError, match="a d_conv of at most 8, weight has 9"):
        causal_conv1d(x, torch.ones(37, 9, device=device), backend="triton")
    with pytest.raises(ValueError, match="cu_seqlens must be on x's device"):
        module.causal_conv1d_triton(
            x, weight, None, None, torch.zeros(2, dtype=torch.int32, device="meta"), True, False
        )


# ---- on a GPU only ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("gpu")
def test_nothing_waits_for_the_gpu() -> None:
    inputs = on("cuda", make_inputs(43, torch.bfloat16, n_seq=len(PACKED) - 1))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    cu_seqlens = torch.tensor(PACKED, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = causal_conv1d(**leaves, activation="silu", return_final_state=True, cu_seqlens=cu_seqlens)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("gpu")
def test_step_in_a_cuda_graph() -> None:
    x, weight, bias, state = on("cuda", make_inputs(1, torch.bfloat16, batch=4)).values()
    rows, x = torch.tensor([2, -1, 0, 3], device="cuda"), x[:, 0]
    expected_state = state.clone()
    causal_conv1d_step(state.clone(), x, weight, bias, activation="silu", state_indices=rows)  # compile it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_step(state, x, weight, bias, activation="silu", state_indices=rows)
    for _ in range(3):
        x.normal_()
        graph.replay()
        expected = causal_conv1d_step_reference(expected_state, x, weight, bias, rows, True)
        torch.testing.assert_close(out, expected)
        assert torch.equal(state, expected_state)


@pytest.mark.usefixtures("gpu")
def test_offsets_beyond_int32() -> None:
    seqlen, d_inner = 2**31 // 16384 + 40, 16384
    x = torch.zeros(1, seqlen, d_inner, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.randn(d_inner, 4, device="cuda")
    with torch.no_grad():
        x[:, -40:].normal_()
    out = causal_conv1d(x, weight, activation="silu")
    seed = torch.zeros_like(out)
    seed[:, -20:] = 1
    (dx,) = torch.autograd.grad(out, x, seed)
    tail = x[:, -40:].detach().requires_grad_()
    expected = causal_conv1d(tail, weight, activation="silu", backend="reference")
    (expected_dx,) = torch.autograd.grad(expected, tail, seed[:, -40:])
    torch.testing.assert_close(out[:, -40:], expected)
    torch.testing.assert_close(dx[:, -40:], expected_dx, rtol=2**-7, atol=2**-7)


def test_packed_bounds_meet_those_of_blocks() -> None:
    """What PACKED claims: an end at a chunk's (4), at a program's own tokens' (9) and at a span's walk past them."""
    ends = [end for start, end in pairwise(PACKED) if end > start]
    assert any(end % 4 == 0 for end in ends) and any(end % 9 == 0 for end in ends)
    assert any(end % 9 in (1, 2, 3) for end in ends)

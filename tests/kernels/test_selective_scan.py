"""Mamba-1's scan: the CPU engines and the decode step against autograd on the float64 reference."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpp
from kernels.selective_scan import cpu_cpp, selective_scan, selective_step
from kernels.selective_scan.reference import step_size

STREAMS = ("u", "dt", "B", "C", "z")


@pytest.fixture(params=["cpp", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu_cpp, "available", lambda: False)
    else:
        assert cpu_cpp.available(), "the test machine needs a C++ compiler"
    return request.param


def make_inputs(batch: int, seqlen: int, d_inner: int, d_state: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "u": draw(batch, seqlen, d_inner),
        "dt": draw(batch, seqlen, d_inner),
        "A": -draw(d_inner, d_state).exp(),
        "B": draw(batch, seqlen, d_state),
        "C": draw(batch, seqlen, d_state),
        "D": draw(d_inner),
        "dt_bias": draw(d_inner),
        "z": draw(batch, seqlen, d_inner),
        "initial_state": draw(batch, d_inner, d_state),
    }


def single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() for name, t in inputs.items()}


def outputs_and_gradients(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """out, the final state, and the gradient of every input through random cotangents of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, state = selective_scan(**leaves, return_final_state=True, **options)
    gradients = torch.autograd.grad(random_loss(out, state), list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, gradients, strict=True))


def random_loss(out: Tensor, state: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    # Cotangents that bf16 holds exactly: autograd hands them back in out's dtype.
    a, b = (torch.randn(t.shape, generator=generator).bfloat16().double() for t in (out, state))
    return (out.double() * a).sum() + (state.double() * b).sum()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 1e-30) -> None:
    """Relative to the largest value of each tensor, so that sums which cancel are judged fairly; NaN fails."""
    for name, expected in want.items():
        if expected.numel():
            scale = expected.abs().max().clamp(min=floor)
            error = ((got[name].double() - expected.double()).abs() / scale).max()
            assert error <= tolerance, f"{name}: {error:.2e}"


def reference(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    wide = {name: t.double() for name, t in inputs.items()}
    return outputs_and_gradients(wide, backend="reference", **options)


def test_reference_is_the_papers_recurrence() -> None:
    """Written out with plain indices."""
    x = make_inputs(1, 3, 2, 2)
    for d in range(2):
        s = x["initial_state"][0, d].clone()
        for t in range(3):
            delta = (1 + (x["dt"][0, t, d] + x["dt_bias"][d]).exp()).log()
            y = x["D"][d] * x["u"][0, t, d]
            for n in range(2):
                s[n] = (delta * x["A"][d, n]).exp() * s[n] + delta * x["u"][0, t, d] * x["B"][0, t, n]
                y = y + s[n] * x["C"][0, t, n]
            out = selective_scan(**x, backend="reference")[0, t, d]
            torch.testing.assert_close(out, y * x["z"][0, t, d] * x["z"][0, t, d].sigmoid())


def test_step_size_is_softplus_to_full_precision() -> None:
    x = torch.tensor(
        [-200.0, -100.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 200.0], dtype=torch.float64, requires_grad=True
    )
    delta = step_size(x)
    want = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    torch.testing.assert_close(delta, want, rtol=1e-15, atol=0)
    torch.testing.assert_close(torch.autograd.grad(delta.sum(), x)[0], torch.sigmoid(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("seqlen", "d_inner", "d_state"),
    [(1, 16, 16), (15, 37, 5), (65, 300, 16), (500, 19, 16), (33, 1, 1), (40, 17, 67)],
)
def test_float64_matches_autograd(engine: str, seqlen: int, d_inner: int, d_state: int) -> None:
    inputs = make_inputs(2, seqlen, d_inner, d_state)
    assert_close(outputs_and_gradients(inputs, backend="cpu"), reference(inputs), 1e-12)


def test_no_steps_at_all(engine: str) -> None:
    got = outputs_and_gradients(make_inputs(2, 0, 8, 4), backend="cpu")
    want = make_inputs(2, 0, 8, 4)["initial_state"]
    torch.testing.assert_close(got["state"], want, rtol=0, atol=0)
    for name in ("out", "u", "A", "B", "D"):
        assert not got[name].any(), name
    assert got["initial_state"].all()  # the final state's gradient, handed through


def test_softplus_and_its_slope_keep_their_digits_in_fp32(engine: str) -> None:
    """One step with A = 0 and u = B = 1 leaves delta in the state."""
    x = torch.linspace(-80, 100, 2000, requires_grad=True)
    ones = torch.ones(1, 1, 1)
    dt = x.view(1, 1, -1)
    options = {"return_final_state": True, "backend": "cpu"}
    _, state = selective_scan(torch.ones_like(dt), dt, torch.zeros(2000, 1), ones, ones, **options)
    torch.testing.assert_close(state.flatten().double(), step_size(x.double()), rtol=5e-7, atol=0)
    slope = torch.autograd.grad(state.sum(), x)[0]
    torch.testing.assert_close(slope.double(), torch.sigmoid(x.double()), rtol=5e-7, atol=0)


@pytest.mark.parametrize("d_state", [16, 5])
@pytest.mark.parametrize("seqlen", [1, 17, 500])
def test_float32_and_bfloat16_stay_near_float64(engine: str, seqlen: int, d_state: int) -> None:
    inputs = single(make_inputs(2, seqlen, 45, d_state))
    assert_close(outputs_and_gradients(inputs, backend="cpu"), reference(inputs), 5e-6)

    half = inputs | {name: inputs[name].bfloat16() for name in STREAMS}
    got, want = outputs_and_gradients(half, backend="cpu"), reference(half)
    assert {got[name].dtype for name in ("out", *STREAMS)} == {torch.bfloat16}
    assert {got[name].dtype for name in ("state", "A", "D", "dt_bias", "initial_state")} == {torch.float32}
    assert_close(got, want, 2**-8)  # one rounding to bf16 of the result
    assert_close({"state": got["state"]}, {"state": want["state"]}, 5e-6)  # the state never is bf16


def test_mixed_dtypes_are_not_rounded_to_us(engine: str) -> None:
    inputs = single(make_inputs(2, 30, 21, 16))
    inputs["u"] = inputs["u"].bfloat16()
    got, want = outputs_and_gradients(inputs, backend="cpu"), reference(inputs)
    assert got["out"].dtype == got["u"].dtype == torch.bfloat16
    assert_close({"state": got["state"]}, {"state": want["state"]}, 5e-6)
    half = {name: t.half() if name in STREAMS else t for name, t in inputs.items()}
    assert_close(outputs_and_gradients(half, backend="cpu"), reference(half), 2**-10)


@pytest.mark.parametrize("dt", [-100.0, -87.5, -30.0, 0.0, 30.0, 100.0])
@pytest.mark.parametrize("rate", [0.0, -1e-4, -1.0, -1e4])
def test_extreme_steps_and_rates(engine: str, dt: float, rate: float) -> None:
    inputs = make_inputs(1, 40, 20, 16)
    inputs["dt"] += dt
    inputs["A"] = inputs["A"].abs() * rate
    inputs = single(inputs)
    got, want = outputs_and_gradients(inputs, backend="cpu"), reference(inputs)
    assert all(t.isfinite().all() for t in got.values())
    # fp32's e^x has a floor of 2e-38, and what it should be is multiplied by rates up to 1e5.
    assert_close(got, want, 2e-5, floor=1e-26)


@pytest.mark.parametrize("z", [-100.0, -30.0, 100.0])
def test_extreme_gates(engine: str, z: float) -> None:
    inputs = make_inputs(1, 40, 20, 16)
    inputs["z"] += z
    inputs = single(inputs)
    got, want = outputs_and_gradients(inputs, backend="cpu"), reference(inputs)
    assert_close(got, want, 2e-5, floor=1e-26)


def test_optional_inputs_and_no_gradient(engine: str) -> None:
    inputs = make_inputs(2, 37, 21, 9)
    bare = {name: inputs[name] for name in ("u", "dt", "A", "B", "C")}
    assert_close(outputs_and_gradients(bare, backend="cpu"), reference(bare), 1e-12)
    with torch.no_grad():
        out = selective_scan(**bare, backend="cpu")
    torch.testing.assert_close(out, selective_scan(**bare, backend="reference"))


def test_only_one_output_used(engine: str) -> None:
    inputs = make_inputs(2, 37, 21, 9)
    for used in (0, 1):
        gradients = []
        for backend in ("cpu", "reference"):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            loss = selective_scan(**leaves, return_final_state=True, backend=backend)[used].square().sum()
            gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        for got, want in zip(*gradients, strict=True):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_split_sequence_equals_whole(engine: str) -> None:
    inputs = make_inputs(2, 100, 21, 9)
    whole = outputs_and_gradients(inputs, backend="cpu")

    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    state, outs = leaves["initial_state"], []
    for start, end in ((0, 1), (1, 45), (45, 100)):
        part = {name: t[:, start:end] if name in STREAMS else t for name, t in leaves.items()}
        out, state = selective_scan(**part | {"initial_state": state}, return_final_state=True, backend="cpu")
        outs.append(out)
    out = torch.cat(outs, 1)
    gradients = torch.autograd.grad(random_loss(out, state), list(leaves.values()))
    assert_close({"out": out, "state": state} | dict(zip(leaves, gradients, strict=True)), whole, 1e-13)


@pytest.mark.parametrize("with_state", [True, False])
def test_packed_documents_equal_separate_ones(engine: str, with_state: bool) -> None:
    bounds = [0, 1, 40, 40, 75, 140]  # a document of one step, and an empty one
    inputs = make_inputs(1, bounds[-1], 21, 9)
    inputs["initial_state"] = make_inputs(len(bounds) - 1, 1, 21, 9, seed=1)["initial_state"]
    if not with_state:
        del inputs["initial_state"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = outputs_and_gradients(inputs, backend="cpu", cu_seqlens=cu_seqlens)
    assert_close(got, reference(inputs, cu_seqlens=cu_seqlens), 1e-12)

    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = {name: t[:, start:end] if name in STREAMS else t for name, t in inputs.items()}
        if with_state:
            alone["initial_state"] = inputs["initial_state"][i : i + 1]
        out, state = selective_scan(**alone, return_final_state=True, backend="reference")
        torch.testing.assert_close(got["out"][:, start:end], out)
        torch.testing.assert_close(got["state"][i : i + 1], state)


def test_no_gradient_crosses_a_document_boundary(engine: str) -> None:
    inputs = {name: t.requires_grad_() for name, t in make_inputs(1, 80, 21, 9).items() if name != "initial_state"}
    out = selective_scan(**inputs, cu_seqlens=torch.tensor([0, 33, 80], dtype=torch.int32), backend="cpu")
    out[:, 33:].sum().backward()
    for name in STREAMS:
        assert torch.count_nonzero(inputs[name].grad[:, :33]) == 0
        assert torch.count_nonzero(inputs[name].grad[:, 33:]) > 0


@pytest.mark.parametrize("packed", [True, False])
def test_every_element_of_every_buffer_is_written(
    engine: str, packed: bool, poison_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(1, 70, 37, 5)
    options = {"cu_seqlens": torch.tensor([0, 70], dtype=torch.int32)} if packed else {}
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(float("nan")))
    assert_close(outputs_and_gradients(inputs, backend="cpu", **options), reference(inputs, **options), 1e-12)


def test_views_are_read_in_place(engine: str) -> None:
    """u and z are halves of in_proj's output, B and C columns of x_proj's; transposed and expanded views are copied."""
    inputs = make_inputs(2, 50, 21, 9)
    inputs["dt_bias"] = inputs["dt_bias"][:1].expand(21)
    want = reference(inputs)
    views = dict(inputs)
    views["u"], views["z"] = torch.cat([inputs["u"], inputs["z"]], -1).chunk(2, -1)
    BC = torch.cat([inputs["B"][..., :3], inputs["B"], inputs["C"]], -1)
    views["B"], views["C"] = BC[..., 3:12], BC[..., 12:]
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    views["A"] = inputs["A"].t().contiguous().t()
    views["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    assert not any(views[name].is_contiguous() for name in views if name != "D")
    assert_close(outputs_and_gradients(views, backend="cpu"), want, 1e-12)


def test_a_cotangent_of_any_layout(engine: str) -> None:
    """An expanded one has stride 0; a transposed one has channels that are not contiguous."""
    inputs = make_inputs(2, 20, 21, 9)
    for cotangent in (torch.ones(1, dtype=torch.float64).expand(2, 20, 21), inputs["u"].mT.contiguous().mT):
        gradients = []
        for backend in ("cpu", "reference"):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            gradients.append(
                torch.autograd.grad(selective_scan(**leaves, backend=backend), list(leaves.values()), cotangent)
            )
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_equal_scan(dtype: torch.dtype) -> None:
    inputs = {name: t.to(dtype) if name in STREAMS else t for name, t in make_inputs(3, 20, 21, 9).items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = inputs["initial_state"].to(wide)
    inputs["initial_state"] = state.clone()
    want, want_state = selective_scan(**inputs, return_final_state=True, backend="reference")
    vectors = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    for t in range(20):
        out = selective_step(state, **{name: inputs[name][:, t] for name in STREAMS}, **vectors)
        assert out.dtype == dtype
        torch.testing.assert_close(out, want[:, t])
    torch.testing.assert_close(state, want_state)


def test_step_with_state_indices() -> None:
    inputs = make_inputs(3, 1, 21, 9)
    tokens = {name: inputs[name][:, 0] for name in STREAMS} | {"A": inputs["A"]}
    state = make_inputs(5, 1, 21, 9, seed=1)["initial_state"]
    before = state.clone()
    out = selective_step(state, **tokens, state_indices=torch.tensor([4, -1, 2]))
    alone = before[[4, 0, 2]].clone()
    want = selective_step(alone, **tokens)
    torch.testing.assert_close(out[[0, 2]], want[[0, 2]])
    assert not out[1].any()
    torch.testing.assert_close(state[[4, 2]], alone[[0, 2]])
    torch.testing.assert_close(state[[0, 1, 3]], before[[0, 1, 3]], rtol=0, atol=0)


def test_result_does_not_depend_on_threads() -> None:
    inputs = single(make_inputs(2, 70, 600, 16))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(inputs, backend="cpu")
        torch.set_num_threads(2)
        two = outputs_and_gradients(inputs, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for name, expected in one.items():
        assert torch.equal(expected, two[name]), name


def test_autocast_does_not_round(engine: str) -> None:
    inputs = {name: t.float() for name, t in make_inputs(2, 40, 24, 16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(inputs, backend="cpu")
    assert_close(got, reference(inputs), 1e-5)


def test_nan_is_not_hidden(engine: str) -> None:
    for name in STREAMS:
        inputs = single(make_inputs(1, 10, 16, 16))
        inputs[name][0, 3] = float("nan")
        out = selective_scan(**inputs, backend="cpu")
        assert out[0, 3].isnan().all(), name
        assert out[0, :3].isfinite().all(), name


def test_missing_compiler_warns_once_and_names_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "find_compiler", lambda: None)
    cpp.load_library.cache_clear()
    inputs = make_inputs(1, 5, 8, 4)
    with pytest.warns(RuntimeWarning, match=r"selective_scan/cpu\.cpp could not be built.*slower.*no C\+\+ compiler"):
        out = selective_scan(**inputs, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(**inputs, backend="cpu")
    cpp.load_library.cache_clear()
    torch.testing.assert_close(out, selective_scan(**inputs, backend="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of"),
        ({"u": torch.zeros(5, 8)}, r"u must be \(batch, seqlen, d_inner\), got shape \(5, 8\)"),
        ({"A": torch.zeros(8, 3)}, r"A must have shape \(8, 4\), got \(8, 3\)"),
        ({"A": torch.zeros(4, 8)}, r"A must have shape \(8, 4\)"),
        ({"C": torch.zeros(2, 5, 3)}, r"C must have shape \(2, 5, 4\)"),
        ({"D": torch.zeros(9)}, r"D must have shape \(8,\)"),
        ({"dt": torch.zeros(2, 5, 8, device="meta")}, "dt must be on u's device, cpu, got meta"),
        ({"initial_state": torch.zeros(2, 4, 8)}, r"initial_state must have shape \(2, 8, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "into a batch of 1, got batch 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor(5, dtype=torch.int32)}, "cu_seqlens must be int32"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make_inputs(2, 5, 8, 4), **change})


def test_cu_seqlens_must_cover_the_row() -> None:
    inputs = {name: t for name, t in make_inputs(1, 5, 8, 4).items() if name != "initial_state"}
    for bounds in ([0, 3], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="must rise from 0 to seqlen 5"):
            selective_scan(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_decay_forgets_and_a_zero_rate_does_not(engine: str) -> None:
    """By hand: u is 1 once, then 0; exp(delta·A) = 1/2 halves the state each step, A = 0 keeps it."""
    steps = 6
    dt = torch.full((1, steps, 1), float(torch.tensor(1.0).expm1().log()))  # softplus(dt) = 1
    u = torch.zeros(1, steps, 1)
    u[0, 0] = 1
    A = torch.tensor([[-0.5], [0.0]]).log1p()  # ln 1/2 and 0
    ones = torch.ones(1, steps, 1)
    halves, kept = (selective_scan(u, dt, A[i : i + 1], ones, ones, backend="cpu")[0, :, 0] for i in range(2))
    torch.testing.assert_close(halves, 0.5 ** torch.arange(steps))
    torch.testing.assert_close(kept, torch.ones(steps))
    torch.testing.assert_close(F.softplus(dt), torch.ones_like(dt))

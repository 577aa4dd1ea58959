"""The CPU engines and the decode step against autograd on the float64 reference (DESIGN §6–7)."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import cpp
from kernels.longhorn_scan import cpu_cpp, longhorn_scan, longhorn_step

UPDATES = ("diagonal", "exact")
STREAMS = ("u", "dt", "q", "k", "z")


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
        "q": draw(batch, seqlen, d_state),
        "k": draw(batch, seqlen, d_state),
        "D": draw(d_inner),
        "dt_bias": draw(d_inner),
        "z": draw(batch, seqlen, d_inner),
        "initial_state": draw(batch, d_inner, d_state),
    }


def outputs_and_gradients(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """out, the final state, and the gradient of every input through random cotangents of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, state = longhorn_scan(**leaves, return_final_state=True, **options)
    gradients = torch.autograd.grad(random_loss(out, state), list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, gradients, strict=True))


def random_loss(out: Tensor, state: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    # Cotangents that bf16 holds exactly: autograd hands them back in out's dtype.
    a, b = (torch.randn(t.shape, generator=generator).bfloat16().double() for t in (out, state))
    return (out.double() * a).sum() + (state.double() * b).sum()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor, so that sums which cancel are judged fairly."""
    for name, expected in want.items():
        scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
        error = ((got[name].double() - expected.double()).abs() / scale).max() if expected.numel() else 0.0
        assert error <= tolerance, f"{name}: {error:.2e}"


def reference(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    wide = {name: t.double() for name, t in inputs.items()}
    return outputs_and_gradients(wide, backend="reference", **options)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("seqlen", "d_inner", "d_state"),
    [(1, 16, 16), (63, 37, 5), (65, 300, 16), (1000, 19, 16), (33, 1, 1), (40, 17, 67)],
)
def test_float64_matches_autograd(engine: str, update: str, seqlen: int, d_inner: int, d_state: int) -> None:
    inputs = make_inputs(2, seqlen, d_inner, d_state)
    got = outputs_and_gradients(inputs, backend="cpu", update=update)
    assert_close(got, reference(inputs, update=update), 1e-12)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seqlen", [1, 63, 65, 1000])
def test_float32_and_bfloat16_stay_near_float64(engine: str, update: str, seqlen: int) -> None:
    inputs = make_inputs(2, seqlen, 45, 16)
    single = {name: t.float() for name, t in inputs.items()}
    got = outputs_and_gradients(single, backend="cpu", update=update)
    assert_close(got, reference(single, update=update), 5e-6)

    half = {name: t.bfloat16() if name in ("u", "dt", "q", "k", "z") else t.float() for name, t in inputs.items()}
    got = outputs_and_gradients(half, backend="cpu", update=update)
    want = reference(half, update=update)
    assert got["out"].dtype == got["u"].dtype == got["q"].dtype == torch.bfloat16
    assert got["state"].dtype == got["D"].dtype == torch.float32
    assert_close(got, want, 2**-8)  # one rounding to bf16 of the result
    assert_close({"state": got["state"]}, {"state": want["state"]}, 5e-6)  # the state never is bf16


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e2, 1e4])
def test_extreme_keys(engine: str, update: str, scale: float) -> None:
    inputs = make_inputs(1, 50, 20, 16)
    inputs["k"] *= scale
    inputs["k"][:, 10:20] = (
        torch.eye(16, dtype=torch.float64)[:10] * scale
    )  # one-hot: where a division by the forget gate fails
    single = {name: t.float() for name, t in inputs.items()}
    got = outputs_and_gradients(single, backend="cpu", update=update)
    assert_close(got, reference(single, update=update), 2e-5)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("dt", "z"), [(100.0, 100.0), (-100.0, -100.0), (-79.0, -30.0), (-90.0, 5.0)])
def test_extreme_steps_and_gates(engine: str, update: str, dt: float, z: float) -> None:
    inputs = make_inputs(1, 40, 20, 16)
    inputs["dt"] += dt
    inputs["z"] += z
    single = {name: t.float() for name, t in inputs.items()}
    got = outputs_and_gradients(single, backend="cpu", update=update)
    want = reference(single, update=update)
    assert all(t.isfinite().all() for t in got.values())
    for name in ("out", "state", "u", "q", "k", "initial_state", "D"):
        floor = {"out": 1e-30} | dict.fromkeys(("u", "q", "k", "D"), 1e-30)
        torch.testing.assert_close(
            got[name].double(),
            want[name].double(),
            rtol=1e-3,
            atol=2e-5 * want[name].abs().max().item() + floor.get(name, 0),
        )
    if dt == -100.0:
        assert not got["dt"].any()  # below the clamp


def test_optional_inputs_and_no_gradient(engine: str) -> None:
    inputs = make_inputs(2, 37, 21, 9)
    bare = {name: inputs[name] for name in ("u", "dt", "q", "k")}
    assert_close(outputs_and_gradients(bare, backend="cpu"), reference(bare), 1e-12)
    with torch.no_grad():
        out = longhorn_scan(**bare, backend="cpu")
    torch.testing.assert_close(out, longhorn_scan(**bare, backend="reference"))


def test_only_one_output_used(engine: str) -> None:
    inputs = make_inputs(2, 37, 21, 9)
    for used in (0, 1):
        gradients = []
        for backend in ("cpu", "reference"):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            loss = longhorn_scan(**leaves, return_final_state=True, backend=backend)[used].square().sum()
            gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        for got, want in zip(*gradients, strict=True):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
def test_split_sequence_equals_whole(engine: str, update: str) -> None:
    inputs = make_inputs(2, 100, 21, 9)
    whole = outputs_and_gradients(inputs, backend="cpu", update=update)

    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    state, outs = leaves["initial_state"], []
    for start, end in ((0, 1), (1, 45), (45, 100)):
        part = {name: leaves[name][:, start:end] for name in ("u", "dt", "q", "k", "z")}
        out, state = longhorn_scan(
            **part,
            D=leaves["D"],
            dt_bias=leaves["dt_bias"],
            initial_state=state,
            return_final_state=True,
            update=update,
            backend="cpu",
        )
        outs.append(out)
    loss = random_loss(torch.cat(outs, 1), state)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    split = {"out": torch.cat(outs, 1), "state": state} | dict(zip(leaves, gradients, strict=True))
    assert_close(split, whole, 1e-13)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_documents_equal_separate_ones(engine: str, update: str, with_state: bool) -> None:
    bounds = [0, 1, 40, 40, 75, 140]  # a document of one step, and an empty one
    inputs = make_inputs(1, bounds[-1], 21, 9)
    inputs["initial_state"] = make_inputs(len(bounds) - 1, 1, 21, 9, seed=1)["initial_state"]
    if not with_state:
        del inputs["initial_state"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = outputs_and_gradients(inputs, backend="cpu", update=update, cu_seqlens=cu_seqlens)
    want = reference(inputs, update=update, cu_seqlens=cu_seqlens)
    assert_close(got, want, 1e-12)

    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = {name: t[:, start:end] if t.dim() == 3 and name != "initial_state" else t for name, t in inputs.items()}
        if with_state:
            alone["initial_state"] = inputs["initial_state"][i : i + 1]
        out, state = longhorn_scan(**alone, return_final_state=True, update=update, backend="reference")
        torch.testing.assert_close(got["out"][:, start:end], out)
        torch.testing.assert_close(got["state"][i : i + 1], state)


def test_no_gradient_crosses_a_document_boundary(engine: str) -> None:
    inputs = {name: t.requires_grad_() for name, t in make_inputs(1, 80, 21, 9).items() if name != "initial_state"}
    out = longhorn_scan(**inputs, cu_seqlens=torch.tensor([0, 33, 80], dtype=torch.int32), backend="cpu")
    out[:, 33:].sum().backward()
    for name in ("u", "dt", "q", "k", "z"):
        assert torch.count_nonzero(inputs[name].grad[:, :33]) == 0
        assert torch.count_nonzero(inputs[name].grad[:, 33:]) > 0


@pytest.mark.parametrize("packed", [True, False])
def test_every_element_of_every_buffer_is_written(engine: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(create):  # type: ignore[no-untyped-def]
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    inputs = make_inputs(1, 70, 37, 5)
    options = {"cu_seqlens": torch.tensor([0, 70], dtype=torch.int32)} if packed else {}
    want = reference(inputs, **options)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert_close(outputs_and_gradients(inputs, backend="cpu", **options), want, 1e-12)


def test_views_are_read_in_place(engine: str) -> None:
    """u and z are halves of in_proj's output, k and q columns of x_proj's; a transposed view is copied."""
    inputs = make_inputs(2, 50, 21, 9)
    want = reference(inputs)
    uz = torch.cat([inputs["u"], inputs["z"]], -1)
    qk = torch.cat([inputs["k"][..., :3], inputs["k"], inputs["q"]], -1)
    views = dict(inputs)
    views["u"], views["z"] = uz.chunk(2, -1)
    views["k"], views["q"] = qk[..., 3:12], qk[..., 12:]
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(views[name].is_contiguous() for name in ("u", "z", "k", "q", "dt"))
    assert_close(outputs_and_gradients(views, backend="cpu"), want, 1e-12)


@pytest.mark.usefixtures("poison_buffers")
@pytest.mark.parametrize("entries_first", [False, True])  # in memory: exports keep (batch, d_state, d_inner)
@pytest.mark.parametrize("d_state", [9, 16])
@pytest.mark.parametrize("update", UPDATES)
def test_steps_equal_scan(engine: str, update: str, d_state: int, entries_first: bool) -> None:
    inputs = make_inputs(3, 20, 37, d_state)
    inputs["k"][:, 3] = 0
    inputs["k"][:, 5] = 30 * functional.one_hot(torch.tensor(2), d_state)
    inputs["dt"][:, 7], inputs["dt"][:, 8] = -300, 300
    want, want_state = longhorn_scan(**inputs, return_final_state=True, update=update, backend="reference")
    state = inputs["initial_state"].clone()
    if entries_first:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    for t in range(20):
        tokens = {name: inputs[name][:, t] for name in STREAMS}
        out = longhorn_step(state, **tokens, D=inputs["D"], dt_bias=inputs["dt_bias"], update=update)
        torch.testing.assert_close(out, want[:, t])
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_steps_stay_near_float64(engine: str, update: str, stored: torch.dtype) -> None:
    """As many as a text has, with streams that bf16 holds exactly and no optional input."""
    inputs = make_inputs(2, 300, 37, 16)
    tokens = {name: inputs[name].to(stored) for name in ("u", "dt", "q", "k")}
    want, want_state = longhorn_scan(
        **{name: t.double() for name, t in tokens.items()}, return_final_state=True, update=update, backend="reference"
    )
    state = torch.zeros(2, 37, 16)
    steps = zip(*(t.unbind(1) for t in tokens.values()), strict=True)
    outs = [longhorn_step(state, *step, update=update) for step in steps]
    assert outs[0].dtype == stored
    tolerance = 2**-8 if stored == torch.bfloat16 else 1e-5
    assert_close({"out": torch.stack(outs, 1)}, {"out": want}, tolerance)
    assert_close({"state": state}, {"state": want_state}, 1e-5)


@pytest.mark.usefixtures("poison_buffers")
def test_step_with_state_indices(engine: str) -> None:
    inputs = make_inputs(3, 1, 21, 9)
    tokens = {name: inputs[name][:, 0] for name in STREAMS}
    state = make_inputs(5, 1, 21, 9, seed=1)["initial_state"]
    before, rows = state.clone(), torch.tensor([4, -1, 2], dtype=torch.int32)
    out = longhorn_step(state, **tokens, state_indices=rows)
    alone = before[[4, 0, 2]].clone()
    want = longhorn_step(alone, **tokens)
    torch.testing.assert_close(out[[0, 2]], want[[0, 2]])
    assert not out[1].any()
    torch.testing.assert_close(state[[4, 2]], alone[[0, 2]])
    torch.testing.assert_close(state[[0, 1, 3]], before[[0, 1, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("name", STREAMS)
def test_a_step_does_not_hide_nan(engine: str, name: str) -> None:
    inputs = {key: t.float() for key, t in make_inputs(1, 1, 37, 16).items()}
    inputs[name][:] = float("nan")
    assert longhorn_step(inputs["initial_state"], **{key: inputs[key][:, 0] for key in STREAMS}).isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": "fast"}, "update must be one of"),
        ({"u": torch.zeros(2, 1, 8)}, r"u must be \(batch, d_inner\)"),
        ({"q": torch.zeros(2, 3)}, r"q must have shape \(2, 4\), got \(2, 3\)"),
        ({"dt": torch.zeros(1, 8)}, r"dt must have shape \(2, 8\)"),
        ({"D": torch.zeros(9)}, r"D must have shape \(8,\)"),
        ({"state": torch.zeros(1, 8, 4)}, r"state must have shape \(2, 8, 4\)"),
        ({"state_indices": torch.tensor([1])}, r"state_indices must have shape \(2,\)"),
        ({"state_indices": torch.tensor([1, 2])}, "state_indices must be below 2, the rows of state, got 2"),
    ],
)
def test_wrong_arguments_of_a_step(engine: str, change: dict[str, object], message: str) -> None:
    right = {"state": torch.zeros(2, 8, 4), "u": torch.zeros(2, 8), "dt": torch.zeros(2, 8)}
    right |= {"q": torch.zeros(2, 4), "k": torch.zeros(2, 4)}
    longhorn_step(**right)
    with pytest.raises(ValueError, match=message):
        longhorn_step(**{**right, **change})


def test_result_does_not_depend_on_threads() -> None:
    inputs = {name: t.float() for name, t in make_inputs(2, 70, 600, 16).items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(inputs, backend="cpu")
        torch.set_num_threads(2)
        two = outputs_and_gradients(inputs, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for name in ("out", "state", "u", "dt", "q", "k", "z", "initial_state"):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("update", UPDATES)
def test_autocast_does_not_round(engine: str, update: str) -> None:
    inputs = {name: t.float() for name, t in make_inputs(2, 40, 24, 16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(inputs, backend="cpu", update=update)
    assert_close(got, reference(inputs, update=update), 1e-5)


def test_nan_is_not_hidden() -> None:
    for name in ("u", "dt", "q", "k", "z"):
        inputs = {key: t.float() for key, t in make_inputs(1, 10, 16, 16).items()}
        inputs[name][0, 3] = float("nan")
        assert longhorn_scan(**inputs, backend="cpu")[0, 3].isnan().all(), name


def test_missing_compiler_warns_once_and_names_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "find_compiler", lambda: None)
    cpp.load_library.cache_clear()
    inputs = make_inputs(1, 5, 8, 4)
    with pytest.warns(RuntimeWarning, match="slower.*no C\\+\\+ compiler"):
        out = longhorn_scan(**inputs, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longhorn_scan(**inputs, backend="cpu")
    cpp.load_library.cache_clear()
    torch.testing.assert_close(out, longhorn_scan(**inputs, backend="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": "fast"}, "update must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"q": torch.zeros(2, 5, 3)}, r"q must have shape \(2, 5, 4\)"),
        ({"D": torch.zeros(9)}, r"D must have shape \(8,\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "initial_state must have shape|batch of 1"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "initial_state must have shape|must be int32"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    inputs = make_inputs(2, 5, 8, 4)
    with pytest.raises(ValueError, match=message):
        longhorn_scan(**{**inputs, **change})


def test_cu_seqlens_must_cover_the_row() -> None:
    inputs = {name: t for name, t in make_inputs(1, 5, 8, 4).items() if name != "initial_state"}
    for bounds in ([0, 3], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="must rise from 0 to seqlen 5"):
            longhorn_scan(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))

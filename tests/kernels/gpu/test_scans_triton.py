"""The Triton scans against their float64 references: outputs, final state and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.longhorn_scan import triton as longhorn
from kernels.longhorn_scan.reference import longhorn_scan_reference
from kernels.scan import triton_scan, triton_walk
from kernels.selective_scan import triton as selective
from kernels.selective_scan.reference import selective_scan_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONAL = ("D", "dt_bias", "z", "initial_state")
LONGHORN = ("diagonal", "exact")
SCANS = (*LONGHORN, "selective")  # whose C and B are called q and k here: its second and first rows


def make_inputs(
    scan: str,
    B: int,
    L: int,
    D: int,
    N: int,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random inputs, every optional one included, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * L + 10 * D + N)
    streams = dict.fromkeys(("u", "dt", "z"), (B, L, D)) | dict.fromkeys(("q", "k"), (B, L, N))
    parameters = {"D": (D,), "dt_bias": (D,), "initial_state": (sequences or B, D, N)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in (streams | parameters).items()}
    if scan == "selective":
        inputs["A"] = -torch.rand(D, N, generator=generator) - 0.1
    return inputs | {name: inputs[name].to(dtype) for name in streams}


def random_cotangents(*tensors: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    given = [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), given), strict=True))


def call_triton(inputs: dict[str, Tensor], cu_seqlens: Tensor | None, scan: str) -> tuple[Tensor, Tensor]:
    u, dt, q, k = (inputs[name] for name in ("u", "dt", "q", "k"))
    optional = [inputs.get(name) for name in OPTIONAL]
    if scan == "selective":
        return selective.triton_scan(u, dt, inputs["A"], k, q, *optional, cu_seqlens)
    return longhorn.triton_scan(u, dt, q, k, *optional, cu_seqlens, scan)


def call_reference(inputs: dict[str, Tensor], cu_seqlens: Tensor | None, scan: str) -> tuple[Tensor, Tensor]:
    options = {name: inputs.get(name) for name in OPTIONAL} | {"cu_seqlens": cu_seqlens}
    u, dt, q, k = (inputs[name] for name in ("u", "dt", "q", "k"))
    if scan == "selective":
        return selective_scan_reference(u, dt, inputs["A"], k, q, **options)
    return longhorn_scan_reference(u, dt, q, k, **options, update=scan)


def run_triton(
    inputs: dict[str, Tensor], cu_seqlens: Tensor | None, scan: str
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Outputs, and the leaves they came from, on the device under test."""
    leaves = {name: t.to(DEVICE).detach().requires_grad_() for name, t in inputs.items()}
    return call_triton(leaves, None if cu_seqlens is None else cu_seqlens.to(DEVICE), scan), leaves


def outputs_and_gradients(inputs: dict[str, Tensor], cu_seqlens: Tensor | None, scan: str) -> dict[str, Tensor]:
    """By name, through random cotangents of both outputs that inputs' dtype holds exactly."""
    outputs, leaves = run_triton(inputs, cu_seqlens, scan)
    assert (outputs[0].dtype, outputs[1].dtype) == (inputs["u"].dtype, torch.float32)
    cotangents = random_cotangents(*outputs)
    cotangents[0] = cotangents[0].to(inputs["u"].dtype).double()
    found = dict(zip(("out", "final_state"), outputs, strict=True))
    return found | gradients(outputs, leaves, cotangents)


def reference_outputs_and_gradients(
    inputs: dict[str, Tensor], cu_seqlens: Tensor | None, scan: str
) -> dict[str, Tensor]:
    exact = {name: t.double().requires_grad_() for name, t in inputs.items()}
    outputs = call_reference(exact, cu_seqlens, scan)
    cotangents = random_cotangents(*outputs)
    cotangents[0] = cotangents[0].to(inputs["u"].dtype).double()
    return dict(zip(("out", "final_state"), outputs, strict=True)) | gradients(outputs, exact, cotangents)


def assert_matches_reference(
    inputs: dict[str, Tensor], scan: str, cu_seqlens: Tensor | None = None, tolerance: float = 2e-6
) -> None:
    """‖actual − expected‖ ≤ tolerance·‖expected‖ for out, final state and each gradient."""
    wanted = reference_outputs_and_gradients(inputs, cu_seqlens, scan)
    found = outputs_and_gradients(inputs, cu_seqlens, scan)
    wrong = {}
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        if name in inputs:
            assert found[name].dtype == inputs[name].dtype, name
        error = (found[name].detach().cpu().double() - want).norm()
        error = (error / want.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
        if not error <= tolerance:  # so written that NaN fails
            wrong[name] = error
    assert not wrong, wrong


@pytest.fixture
def small_blocks(poison_buffers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and launches so small that small inputs span several; fresh buffers hold NaN."""
    for module in (triton_scan, triton_walk):
        monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(triton_scan, "SCRATCH_BYTES", 3 * (8 // 2 + 2) * 4 * 8 * 32)  # three programs of 8 states


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("B", "L"), [(2, 1), (2, 7), (1, 33)])
def test_outputs_and_gradients(small_blocks: None, B: int, L: int, scan: str) -> None:
    assert_matches_reference(make_inputs(scan, B, L, D=19, N=5), scan)


def test_blocks_as_shipped(poison_buffers: None) -> None:
    assert_matches_reference(make_inputs("diagonal", B=1, L=66, D=65, N=16), "diagonal")


@pytest.mark.parametrize("scan", SCANS)
def test_one_channel_and_one_state(small_blocks: None, scan: str) -> None:
    assert_matches_reference(make_inputs(scan, B=1, L=3, D=1, N=1), scan)


@pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL), OPTIONAL[:3]])
def test_optional_inputs(small_blocks: None, present: tuple[str, ...]) -> None:
    inputs = make_inputs("diagonal", B=1, L=4, D=3, N=2)
    absent = set(OPTIONAL) - set(present)
    inputs = {name: t for name, t in inputs.items() if name not in absent}
    assert_matches_reference(inputs, "diagonal")


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("with_initial_state", [True, False])
def test_packed_documents(small_blocks: None, scan: str, with_initial_state: bool) -> None:
    bounds = torch.tensor([0, 0, 5, 5, 17, 20], dtype=torch.int32)  # two of them empty
    inputs = make_inputs(scan, B=1, L=20, D=5, N=3, sequences=5)
    if not with_initial_state:
        del inputs["initial_state"]
    assert_matches_reference(inputs, scan, bounds)


def test_empty_documents_keep_their_state(small_blocks: None) -> None:
    bounds = torch.tensor([0, 0, 4, 4], dtype=torch.int32)
    inputs = make_inputs("diagonal", B=1, L=4, D=5, N=3, sequences=3)
    (_, final), _ = run_triton(inputs, bounds, "diagonal")
    kept = [0, 2]
    assert torch.equal(final[kept].cpu(), inputs["initial_state"][kept])


@pytest.mark.parametrize("scan", SCANS)
def test_no_gradient_crosses_a_boundary(small_blocks: None, scan: str) -> None:
    bounds = torch.tensor([0, 3, 9, 12], dtype=torch.int32)
    inputs = make_inputs(scan, B=1, L=12, D=5, N=3, sequences=3)
    (out, final), leaves = run_triton(inputs, bounds, scan)
    found = torch.autograd.grad(out[:, 3:9].square().sum() + final[1].square().sum(), list(leaves.values()))
    found = dict(zip(leaves, found, strict=True))
    outside = [0, 1, 2, 9, 10, 11]
    for name in ("u", "dt", "q", "k", "z"):
        assert found[name][:, outside].count_nonzero() == 0, name
        assert found[name][:, 3:9].count_nonzero() > 0, name
    assert found["initial_state"][[0, 2]].count_nonzero() == 0
    assert found["initial_state"][1].count_nonzero() > 0


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)])
def test_low_precision_inputs(small_blocks: None, dtype: torch.dtype, tolerance: float, scan: str) -> None:
    # The rounding of results to dtype and no more (the interpreter truncates to bf16: 3.4e-3 rms).
    inputs = make_inputs(scan, B=1, L=12, D=5, N=3, dtype=dtype)
    assert_matches_reference(inputs, scan, tolerance=tolerance)


def test_mixed_dtypes(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=4, D=5, N=3)
    inputs |= {"u": inputs["u"].bfloat16(), "k": inputs["k"].half()}
    assert_matches_reference(inputs, "diagonal", tolerance=5e-3)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("scale", [0.1, 1e4])
def test_scales_of_k(small_blocks: None, scale: float, scan: str) -> None:
    inputs = make_inputs(scan, B=1, L=20, D=5, N=3)
    inputs["k"] *= scale
    assert_matches_reference(inputs, scan, tolerance=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", ["dt", "z"])
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_saturated_gates(small_blocks: None, name: str, value: float, scan: str) -> None:
    inputs = make_inputs(scan, B=1, L=8, D=3, N=2)
    inputs[name][:, ::2] = value  # dt = −100 is below the clamp
    # dt_bias's gradient is a sum of four terms that cancel to a fortieth of their size.
    assert_matches_reference(inputs, scan, tolerance=5e-6)


def test_everything_saturated(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=4, D=3, N=2)
    inputs["z"] = torch.full_like(inputs["z"], -100.0)
    inputs["dt"] = torch.full_like(inputs["dt"], -100.0)
    (out, final), leaves = run_triton(inputs, None, "diagonal")
    found = gradients((out, final), leaves, random_cotangents(out, final))
    assert out.abs().max() < 1e-30
    assert found["dt"].count_nonzero() == 0
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_nan_in_dt_is_not_hidden_by_the_clamp(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=3, D=2, N=2)
    inputs["dt"][0, 1, 1] = float("nan")
    (out, _), _ = run_triton(inputs, None, "diagonal")
    assert out[0, 1:, 1].isnan().all()
    assert not out[0, :, 0].isnan().any()


def test_views_equal_contiguous_tensors(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=2, L=5, D=4, N=3)
    expected, leaves = run_triton(inputs, None, "diagonal")
    cotangents = random_cotangents(*expected)
    wanted = gradients(expected, leaves, cotangents)

    views = {name: t.to(DEVICE) for name, t in inputs.items()}
    views["u"], views["z"] = torch.cat([views["u"], views["z"]], -1).chunk(2, -1)
    views["k"], views["q"] = torch.cat([views["k"], views["q"]], -1).chunk(2, -1)
    views["dt"] = views["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    views["initial_state"] = views["initial_state"].mT.contiguous().mT
    views["D"] = torch.stack([views["D"]] * 2, 1)[:, 0]
    views = {name: view.detach().requires_grad_() for name, view in views.items()}
    order = ("u", "dt", "q", "k", *OPTIONAL)
    actual = call_triton(views, None, "diagonal")
    found = gradients(actual, views, cotangents)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(torch.equal(found[name], wanted[name]) for name in order)


def test_channels_apart_are_copied(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=3, D=4, N=2)
    inputs["u"] = inputs["u"].mT.contiguous().mT
    inputs["q"] = inputs["q"][:, :1].expand(-1, 3, -1)
    inputs["k"] = inputs["k"][..., :1].expand(-1, -1, 2)
    assert_matches_reference(inputs, "diagonal")


def test_expanded_and_absent_cotangents(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=3, D=4, N=2)
    exact = {name: t.double().requires_grad_() for name, t in inputs.items()}
    for result in (0, 1):  # out alone, final state alone
        value, leaves = run_triton(inputs, None, "exact")
        used = {n: t for n, t in leaves.items() if result == 0 or n not in ("z", "D", "q")}
        found = torch.autograd.grad(value[result].sum(), list(used.values()))
        reference = longhorn_scan_reference(**exact, update="exact")[result].sum()
        wanted = torch.autograd.grad(reference, [exact[name] for name in used])
        for name, a, e in zip(used, found, wanted, strict=True):
            torch.testing.assert_close(a.cpu().double(), e, rtol=1e-5, atol=1e-6, msg=name)


def test_without_gradients(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=9, D=4, N=2)
    (out, final), _ = run_triton(inputs, None, "diagonal")
    with torch.no_grad():
        (plain_out, plain_final), _ = run_triton(inputs, None, "diagonal")
    assert torch.equal(out, plain_out) and torch.equal(final, plain_final)
    assert not plain_out.requires_grad and not plain_final.requires_grad


def test_no_tokens(small_blocks: None) -> None:
    (out, final), _ = run_triton(make_inputs("diagonal", B=2, L=0, D=4, N=2), None, "diagonal")
    assert out.shape == (2, 0, 4)
    assert torch.equal(final.cpu(), make_inputs("diagonal", B=2, L=0, D=4, N=2)["initial_state"])


@pytest.mark.parametrize("scan", SCANS)
def test_no_channels(small_blocks: None, scan: str) -> None:
    (out, final), leaves = run_triton(make_inputs(scan, B=2, L=9, D=0, N=4), None, scan)
    assert (out.shape, final.shape) == ((2, 9, 0), (2, 0, 4))
    found = torch.autograd.grad((out.sum() + final.sum()), [leaves["q"], leaves["k"]])
    assert not any(gradient.any() for gradient in found)


def test_refuses_float64(small_blocks: None) -> None:
    inputs = {name: t.double() for name, t in make_inputs("diagonal", B=1, L=1, D=2, N=2).items()}
    with pytest.raises(TypeError, match="float64 use backend 'cpu'"):
        run_triton(inputs, None, "diagonal")


def test_refuses_more_documents_than_a_grid_holds(small_blocks: None) -> None:
    inputs = make_inputs("diagonal", B=1, L=1, D=1, N=1)
    bounds = torch.ones(65537, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 65535 rows or documents, not 65536"):
        run_triton(inputs, bounds, "diagonal")


# ---- long rows: time is cut into segments -----------------------------------------------------------------------
@pytest.fixture
def segments(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with the number of warps that are enough: more of them cut time into more segments."""
    monkeypatch.setattr(triton_walk, "MIN_SEGMENT", 8)
    return lambda enough: monkeypatch.setattr(triton_walk, "ENOUGH_WARPS", enough)


def cut(inputs: dict[str, Tensor]) -> tuple[int, int]:
    walks = triton_walk.Walks.of(inputs["u"], inputs["k"].shape[-1], None, cut_time=True)
    return walks.segments, walks.segment


@pytest.mark.parametrize(("B", "L", "expected"), [(1, 37, (4, 16)), (2, 16, (2, 8)), (1, 33, (3, 16))])
def test_segments_match_reference(segments: Callable[[int], None], B: int, L: int, expected: tuple[int, int]) -> None:
    segments(4)
    inputs = make_inputs("diagonal", B, L, D=19, N=5)
    if (B, L) == (1, 37):
        expected = (3, 16)  # of 16, 16 and 5 tokens
    assert cut(inputs) == expected
    assert_matches_reference(inputs, "diagonal")


@pytest.mark.parametrize("present", [(), ("z",), ("dt_bias", "initial_state")])
def test_segments_with_optional_inputs(segments: Callable[[int], None], present: tuple[str, ...]) -> None:
    segments(4)
    inputs = make_inputs("diagonal", B=1, L=24, D=3, N=2)
    inputs = {name: t for name, t in inputs.items() if name not in OPTIONAL or name in present}
    assert cut(inputs) == (3, 8)
    assert_matches_reference(inputs, "diagonal")


def test_segments_keep_what_is_forgotten_slowly(segments: Callable[[int], None]) -> None:
    """Factors of 1 − 1e-8 round to 1 in fp32: their product must not."""
    segments(2)
    inputs = make_inputs("diagonal", B=1, L=64, D=2, N=2)
    del inputs["initial_state"]
    inputs["k"] = inputs["k"] * 1e-4
    assert cut(inputs) == (2, 32)
    assert_matches_reference(inputs, "diagonal", tolerance=1e-5)


def test_only_long_rows_of_the_diagonal_update_are_cut() -> None:
    u = torch.empty(1, 32768, 4096, device="meta")
    assert triton_walk.Walks.of(u, 16, None, cut_time=True).segments == 8
    assert triton_walk.Walks.of(u, 16, None, cut_time=False).segments == 1
    assert triton_walk.Walks.of(u, 16, torch.tensor([0, 32768]), cut_time=True).segments == 1
    assert triton_walk.Walks.of(u.expand(8, -1, -1), 16, None, cut_time=True).segments == 1
    assert triton_walk.Walks.of(u[:, :500], 16, None, cut_time=True).segments == 1


# ---- the rest ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("N", [32, 48])
def test_states_shared_out_over_warps(small_blocks: None, scan: str, N: int) -> None:
    assert_matches_reference(make_inputs(scan, B=1, L=9, D=33, N=N), scan)


@pytest.mark.parametrize("scan", LONGHORN)
def test_one_hot_keys(small_blocks: None, scan: str) -> None:
    """Where dividing by the forget gate would fail."""
    inputs = make_inputs(scan, B=1, L=12, D=5, N=4)
    inputs["k"] = 1e4 * torch.eye(4)[torch.arange(12) % 4].unsqueeze(0)
    del inputs["initial_state"]  # 1e4 of it would leave three digits of k's gradient, in any fp32 backend
    assert_matches_reference(inputs, scan, tolerance=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_scales_of_rates(small_blocks: None, scale: float) -> None:
    inputs = make_inputs("selective", B=1, L=12, D=5, N=3)
    inputs["A"] *= scale
    assert_matches_reference(inputs, "selective", tolerance=1e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_results_repeat_bit_for_bit(small_blocks: None, scan: str) -> None:
    inputs = make_inputs(scan, B=1, L=10, D=40, N=4)
    first, second = (outputs_and_gradients(inputs, None, scan) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scan", SCANS)
def test_states_too_large_for_registers_are_refused(scan: str) -> None:
    with pytest.raises(ValueError, match="a d_state of at most 64, not 65"):
        run_triton(make_inputs(scan, B=1, L=1, D=1, N=65), None, scan)


# ---- on a GPU alone ------------------------------------------------------------------------------------------------
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("B", "L", "D"), [(2, 515, 1000), (1, 4099, 256)])
def test_training_sizes(scan: str, B: int, L: int, D: int) -> None:
    """bf16 streams, as a layer has them; (1, 4099) is cut into segments."""
    inputs = make_inputs(scan, B, L, D, N=16, dtype=torch.bfloat16)
    assert_matches_reference(inputs, scan, tolerance=5e-3)


@on_gpu
def test_more_elements_than_int32_counts() -> None:
    """B·L·D > 2^31: the last rows are right, forward and backward."""
    B, L, D, N = 9, 65536, 4096, 1
    rows = {name: torch.randn(1, 1, D, device="cuda", dtype=torch.bfloat16).expand(B, L, D) for name in ("u", "dt")}
    leaves = {name: t.contiguous().requires_grad_() for name, t in rows.items()}
    q, k = (torch.ones(B, L, N, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, _ = longhorn.triton_scan(*leaves.values(), q, k, *(None,) * 5, "diagonal")
    assert torch.equal(out[0], out[-1])
    out.backward(torch.ones_like(out))
    for leaf in leaves.values():
        assert torch.equal(leaf.grad[0], leaf.grad[-1])


@on_gpu
def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs("diagonal", B=1, L=70, D=64, N=16, sequences=3)
    bounds = torch.tensor([0, 20, 40, 70], dtype=torch.int32)
    outputs_and_gradients(inputs, bounds, "diagonal")  # compiled
    leaves = {name: t.cuda().requires_grad_() for name, t in inputs.items()}
    bounds = bounds.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, final = call_triton(leaves, bounds, "diagonal")
        (out.sum() + final.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

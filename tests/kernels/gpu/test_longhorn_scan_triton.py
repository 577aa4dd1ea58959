"""The Triton scan against the float64 reference: outputs, final state and every gradient.

Runs on a GPU where there is one, else under Triton's interpreter. That must be switched on before
anything imports triton, which other tests' imports do, so then the cases run in a fresh process.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.longhorn_scan.reference import longhorn_scan_reference

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = INTERPRETED or DEVICE == "cuda"
OPTIONAL = ("D", "dt_bias", "z", "initial_state")
UPDATES = ("diagonal", "exact")


def make_inputs(
    B: int, L: int, D: int, N: int, sequences: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random inputs, every optional one included, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * L + 10 * D + N)
    streams = dict.fromkeys(("u", "dt", "z"), (B, L, D)) | dict.fromkeys(("q", "k"), (B, L, N))
    parameters = {"D": (D,), "dt_bias": (D,), "initial_state": (sequences or B, D, N)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in (streams | parameters).items()}
    return inputs | {name: inputs[name].to(dtype) for name in streams}


def random_cotangents(*tensors: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    given = [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), given), strict=True))


def run_triton(
    module: ModuleType, inputs: dict[str, Tensor], cu_seqlens: Tensor | None, update: str
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Outputs, and the leaves they came from, on the device under test."""
    leaves = {name: t.to(DEVICE).detach().requires_grad_() for name, t in inputs.items()}
    order = ("u", "dt", "q", "k", *OPTIONAL)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
    return module.triton_scan(*(leaves.get(name) for name in order), cu_seqlens, update), leaves


def assert_matches_reference(
    module: ModuleType,
    inputs: dict[str, Tensor],
    update: str,
    cu_seqlens: Tensor | None = None,
    tolerance: float = 2e-6,
) -> None:
    """‖actual − expected‖ ≤ tolerance·‖expected‖ for out, final state and each gradient."""
    exact = {name: t.double().requires_grad_() for name, t in inputs.items()}
    expected = longhorn_scan_reference(**exact, cu_seqlens=cu_seqlens, update=update)
    cotangents = random_cotangents(*expected)
    cotangents[0] = cotangents[0].to(inputs["u"].dtype).double()
    wanted = dict(zip(("out", "final_state"), expected, strict=True))
    wanted |= gradients(expected, exact, cotangents)

    actual, leaves = run_triton(module, inputs, cu_seqlens, update)
    assert (actual[0].dtype, actual[1].dtype) == (inputs["u"].dtype, torch.float32)
    found = dict(zip(("out", "final_state"), actual, strict=True))
    found |= gradients(actual, leaves, cotangents)
    errors = {}
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        if name in inputs:
            assert found[name].dtype == inputs[name].dtype, name
        error = (found[name].detach().cpu().double() - want).norm()
        errors[name] = (error / want.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # so written that NaN fails
    assert not wrong, wrong


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module under test, in a torch whose fresh buffers hold NaN."""
    import kernels.longhorn_scan.triton as module

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            buffer = original(*args, **kwargs)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        monkeypatch.setattr(owner, name, poisoned)
    return module


@pytest.fixture
def scan(as_shipped: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same with blocks so small that small inputs span several of each kind."""
    import kernels.scan.triton_walk as walk

    monkeypatch.setattr(walk, "CHUNK", 8)
    monkeypatch.setattr(as_shipped, "CHUNK", 8)
    monkeypatch.setattr(as_shipped, "PROGRAMS_PER_LAUNCH", 3)
    return as_shipped


class TestTritonScan:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize(("B", "L"), [(2, 1), (2, 7), (1, 33)])
    def test_outputs_and_gradients(self, scan: ModuleType, B: int, L: int, update: str) -> None:
        assert_matches_reference(scan, make_inputs(B, L, D=19, N=5), update)

    def test_blocks_as_shipped(self, as_shipped: ModuleType) -> None:
        assert_matches_reference(as_shipped, make_inputs(B=1, L=66, D=65, N=16), "diagonal")

    @pytest.mark.parametrize("update", UPDATES)
    def test_one_channel_and_one_state(self, scan: ModuleType, update: str) -> None:
        assert_matches_reference(scan, make_inputs(B=1, L=3, D=1, N=1), update)

    @pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL), OPTIONAL[:3]])
    def test_optional_inputs(self, scan: ModuleType, present: tuple[str, ...]) -> None:
        inputs = make_inputs(B=1, L=4, D=3, N=2)
        absent = set(OPTIONAL) - set(present)
        inputs = {name: t for name, t in inputs.items() if name not in absent}
        assert_matches_reference(scan, inputs, "diagonal")

    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("with_initial_state", [True, False])
    def test_packed_documents(self, scan: ModuleType, update: str, with_initial_state: bool) -> None:
        bounds = torch.tensor([0, 0, 5, 5, 17, 20], dtype=torch.int32)  # two of them empty
        inputs = make_inputs(B=1, L=20, D=5, N=3, sequences=5)
        if not with_initial_state:
            del inputs["initial_state"]
        assert_matches_reference(scan, inputs, update, bounds)

    def test_empty_documents_keep_their_state(self, scan: ModuleType) -> None:
        bounds = torch.tensor([0, 0, 4, 4], dtype=torch.int32)
        inputs = make_inputs(B=1, L=4, D=5, N=3, sequences=3)
        (_, final), _ = run_triton(scan, inputs, bounds, "diagonal")
        kept = [0, 2]
        assert torch.equal(final[kept].cpu(), inputs["initial_state"][kept])

    @pytest.mark.parametrize("update", UPDATES)
    def test_no_gradient_crosses_a_boundary(self, scan: ModuleType, update: str) -> None:
        bounds = torch.tensor([0, 3, 9, 12], dtype=torch.int32)
        inputs = make_inputs(B=1, L=12, D=5, N=3, sequences=3)
        (out, final), leaves = run_triton(scan, inputs, bounds, update)
        found = torch.autograd.grad(out[:, 3:9].square().sum() + final[1].square().sum(), list(leaves.values()))
        found = dict(zip(leaves, found, strict=True))
        outside = [0, 1, 2, 9, 10, 11]
        for name in ("u", "dt", "q", "k", "z"):
            assert found[name][:, outside].count_nonzero() == 0, name
            assert found[name][:, 3:9].count_nonzero() > 0, name
        assert found["initial_state"][[0, 2]].count_nonzero() == 0
        assert found["initial_state"][1].count_nonzero() > 0

    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)])
    def test_low_precision_inputs(self, scan: ModuleType, dtype: torch.dtype, tolerance: float, update: str) -> None:
        # The rounding of results to dtype and no more (the interpreter truncates to bf16: 3.4e-3 rms).
        inputs = make_inputs(B=1, L=12, D=5, N=3, dtype=dtype)
        assert_matches_reference(scan, inputs, update, tolerance=tolerance)

    def test_mixed_dtypes(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=4, D=5, N=3)
        inputs |= {"u": inputs["u"].bfloat16(), "k": inputs["k"].half()}
        assert_matches_reference(scan, inputs, "diagonal", tolerance=5e-3)

    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("scale", [0.1, 1e4])
    def test_scales_of_k(self, scan: ModuleType, scale: float, update: str) -> None:
        inputs = make_inputs(B=1, L=20, D=5, N=3)
        inputs["k"] *= scale
        assert_matches_reference(scan, inputs, update, tolerance=1e-5)

    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("name", ["dt", "z"])
    @pytest.mark.parametrize("value", [-100.0, 100.0])
    def test_saturated_gates(self, scan: ModuleType, name: str, value: float, update: str) -> None:
        inputs = make_inputs(B=1, L=8, D=3, N=2)
        inputs[name][:, ::2] = value  # dt = −100 is below the clamp
        # dt_bias's gradient is a sum of four terms that cancel to a fortieth of their size.
        assert_matches_reference(scan, inputs, update, tolerance=5e-6)

    def test_everything_saturated(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=4, D=3, N=2)
        inputs["z"] = torch.full_like(inputs["z"], -100.0)
        inputs["dt"] = torch.full_like(inputs["dt"], -100.0)
        (out, final), leaves = run_triton(scan, inputs, None, "diagonal")
        found = gradients((out, final), leaves, random_cotangents(out, final))
        assert out.abs().max() < 1e-30
        assert found["dt"].count_nonzero() == 0
        assert all(gradient.isfinite().all() for gradient in found.values())

    def test_nan_in_dt_is_not_hidden_by_the_clamp(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=3, D=2, N=2)
        inputs["dt"][0, 1, 1] = float("nan")
        (out, _), _ = run_triton(scan, inputs, None, "diagonal")
        assert out[0, 1:, 1].isnan().all()
        assert not out[0, :, 0].isnan().any()

    def test_views_equal_contiguous_tensors(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=2, L=5, D=4, N=3)
        expected, leaves = run_triton(scan, inputs, None, "diagonal")
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
        actual = scan.triton_scan(*(views[name] for name in order), None, "diagonal")
        found = gradients(actual, views, cotangents)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert all(torch.equal(found[name], wanted[name]) for name in order)

    def test_channels_apart_are_copied(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=3, D=4, N=2)
        inputs["u"] = inputs["u"].mT.contiguous().mT
        inputs["q"] = inputs["q"][:, :1].expand(-1, 3, -1)
        inputs["k"] = inputs["k"][..., :1].expand(-1, -1, 2)
        assert_matches_reference(scan, inputs, "diagonal")

    def test_expanded_and_absent_cotangents(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=3, D=4, N=2)
        exact = {name: t.double().requires_grad_() for name, t in inputs.items()}
        for result in (0, 1):  # out alone, final state alone
            value, leaves = run_triton(scan, inputs, None, "exact")
            used = {n: t for n, t in leaves.items() if result == 0 or n not in ("z", "D", "q")}
            found = torch.autograd.grad(value[result].sum(), list(used.values()))
            reference = longhorn_scan_reference(**exact, update="exact")[result].sum()
            wanted = torch.autograd.grad(reference, [exact[name] for name in used])
            for name, a, e in zip(used, found, wanted, strict=True):
                torch.testing.assert_close(a.cpu().double(), e, rtol=1e-5, atol=1e-6, msg=name)

    def test_without_gradients(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=9, D=4, N=2)
        (out, final), _ = run_triton(scan, inputs, None, "diagonal")
        with torch.no_grad():
            (plain_out, plain_final), _ = run_triton(scan, inputs, None, "diagonal")
        assert torch.equal(out, plain_out) and torch.equal(final, plain_final)
        assert not plain_out.requires_grad and not plain_final.requires_grad

    def test_no_tokens(self, scan: ModuleType) -> None:
        (out, final), _ = run_triton(scan, make_inputs(B=2, L=0, D=4, N=2), None, "diagonal")
        assert out.shape == (2, 0, 4)
        assert torch.equal(final.cpu(), make_inputs(B=2, L=0, D=4, N=2)["initial_state"])

    def test_refuses_float64(self, scan: ModuleType) -> None:
        inputs = {name: t.double() for name, t in make_inputs(B=1, L=1, D=2, N=2).items()}
        with pytest.raises(TypeError, match="float64 use backend 'cpu'"):
            run_triton(scan, inputs, None, "diagonal")

    def test_refuses_more_documents_than_a_grid_holds(self, scan: ModuleType) -> None:
        inputs = make_inputs(B=1, L=1, D=1, N=1)
        bounds = torch.ones(65537, dtype=torch.int32)
        with pytest.raises(ValueError, match="at most 65535 rows or documents, not 65536"):
            run_triton(scan, inputs, bounds, "diagonal")


class TestUnderTheInterpreter:
    __test__ = not RUNS_HERE

    def test_all_cases(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        child = subprocess.run(
            [*command, "--import-mode=importlib"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stdout + child.stderr

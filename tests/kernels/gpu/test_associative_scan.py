"""The benchmarks' time-parallel scan is right: a wrong one would be no one to compare with."""

import torch

from kernels.benchmarks.associative import associative_scan
from kernels.longhorn_scan import longhorn_scan


def test_equals_the_oracle_across_chunks(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    streams = {name: draw(2, 71, 11) for name in ("u", "dt", "z")}
    inputs = streams | {"q": draw(2, 71, 16), "k": draw(2, 71, 16), "D": draw(11), "dt_bias": draw(11)}
    inputs["dt"][0, 3:5] = -200.0
    want = longhorn_scan(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    torch.testing.assert_close(associative_scan(**inputs).double(), want, rtol=1e-5, atol=1e-5)

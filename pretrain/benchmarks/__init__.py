"""Speed of whole models: against Llama on a CPU (`llama`), a training step (`step`), decoding (`decode`)."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmark_results"

"""Speed of the kernels, variants side by side in one run: `python -m kernels.benchmarks --help`."""

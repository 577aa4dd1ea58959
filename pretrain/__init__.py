"""Training, evaluation, generation and conversion of the models in longhorn_layers."""

import warnings

# megatron-core says so on every import, on each rank; neither is used here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex")

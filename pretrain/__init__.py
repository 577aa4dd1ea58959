"""Training, evaluation, generation and conversion of the models in longhorn_layers."""

"""Longhorn as plain PyTorch modules for one device; parallelism is applied from outside (pretrain/parallel)."""

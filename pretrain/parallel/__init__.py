"""Parallelism applied from outside: ranks and groups, tensor-parallel plans, ZeRO."""

"""A plan as tables to print."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

from pretrain.flops import (
    layer_mixing,
    matmul_flops_per_token,
    mixing_flops_per_token,
    recomputed_flops_per_token,
)
from pretrain.memory import GIB, MASTER_AND_MOMENTS

if TYPE_CHECKING:
    from pretrain.plan import Plan

UINT16_VOCABULARY = 65_500  # below it Megatron's .bin holds two bytes a token, else four


def show(plan: "Plan", console: Console) -> None:
    """Print the tables: ruled on a terminal, bare columns elsewhere."""
    for title, rows in tables(plan):
        show_table(title, rows, console)


def show_table(title: str, rows: list[tuple[str, str]], console: Console, justify: JustifyMethod = "right") -> None:
    """Print one: `justify`, how its second column is."""
    table = Table(show_header=False, box=SIMPLE_HEAD if console.is_terminal else None)
    table.add_column(no_wrap=True)
    table.add_column(justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "total" else None)
    console.print(title, style="bold", highlight=False)
    console.print(table, highlight=False)
    console.print()


def tables(plan: "Plan") -> list[tuple[str, list[tuple[str, str]]]]:
    """Each table's title and rows, to print."""
    return [
        ("Run", _run_rows(plan)),
        ("Memory per GPU, bytes by part added (estimate)", _memory_rows(plan)),
        ("FLOPs per token (counted: pretrain/flops.py)", _flops_rows(plan)),
        (f"Time at an assumed MFU of {plan.options.mfu:.0%} (estimate)", _time_rows(plan)),
        ("Disk (estimate)", _disk_rows(plan)),
    ]


def _run_rows(plan: "Plan") -> list[tuple[str, str]]:
    config, options = plan.config, plan.options
    tensor, stage = config.parallel.tensor, config.parallel.zero_stage
    parallel = f"{tensor} tensor × {plan.data_parallel} data, ZeRO {stage}"
    return [
        ("parameters", f"{plan.counts.total:,} ({plan.counts.total / 1e9:.2f}B)"),
        ("GPUs", f"{options.gpus} = {options.nodes} nodes × {options.gpus_per_node}; {parallel}"),
        ("tokens per step", f"{config.tokens_per_step:,}"),
        ("optimizer steps", f"{config.total_steps:,}"),
        ("tokens", f"{plan.tokens:,}"),
        ("micro-batch per GPU", f"{config.train.micro_batch_size} × {config.data.seqlen} tokens"),
        ("gradient accumulation", f"{config.grad_accum_steps(plan.data_parallel)}"),
    ]


def _memory_rows(plan: "Plan") -> list[tuple[str, str]]:
    parts = plan.memory()
    rows = [(part, gib(size)) for part, size in parts.items()]
    return [*rows, ("total", f"{gib(sum(parts.values()))} of {plan.options.gpu_memory_gib:g} GiB")]


def _flops_rows(plan: "Plan") -> list[tuple[str, str]]:
    model, seqlen = plan.config.model, plan.config.data.seqlen
    rebuilt = recomputed_flops_per_token(model, seqlen, activation_checkpointing=False)
    mixing, rebuilt_mixing = layer_mixing(model, seqlen).names
    flops = {
        "matmuls, 6 × weights with the head, no embedding": matmul_flops_per_token(model),
        f"{mixing}, forward and backward": mixing_flops_per_token(model, seqlen),
        "model total (what MFU counts)": plan.flops_per_token,
        f"recomputed besides: {rebuilt_mixing}": rebuilt,
        "recomputed besides: activation checkpointing": plan.recomputed_flops - rebuilt,
    }
    return [(name, f"{value / 1e9:.3f} GFLOPs") for name, value in flops.items()]


def _time_rows(plan: "Plan") -> list[tuple[str, str]]:
    options, rate = plan.options, plan.tokens_per_second
    hours = plan.tokens / rate / 3600
    done = 1 + plan.recomputed_flops / plan.flops_per_token
    return [
        ("peak per GPU (given)", f"{options.peak_tflops:g} TFLOP/s"),
        ("with what is recomputed, share of the peak needed", f"{options.mfu * done:.0%}"),
        ("tokens/s", f"{rate:,.0f} ({rate / options.gpus:,.0f} per GPU)"),
        ("hours", f"{hours:,.1f}"),
        ("GPU hours", f"{hours * options.gpus:,.0f}"),
    ]


def _disk_rows(plan: "Plan") -> list[tuple[str, str]]:
    keep_last = plan.config.checkpoint.keep_last
    width = 2 if plan.config.model.vocab_size < UINT16_VOCABULARY else 4
    checkpoint, data = plan.checkpoint_bytes, width * plan.tokens
    held = (keep_last + 1) * checkpoint  # the next is complete before the oldest is removed
    return [
        (f"one checkpoint ({MASTER_AND_MOMENTS} bytes/parameter)", _gb(checkpoint)),
        (f"checkpoint.keep_last={keep_last}", _gb(keep_last * checkpoint)),
        ("while the next is written", _gb(held)),
        (f"training tokens, one pass ({width} bytes each)", _gb(data)),
        ("total", _gb(held + data)),
    ]


def gib(size: float) -> str:
    """Bytes, to print."""
    return f"{size / GIB:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"

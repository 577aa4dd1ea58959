"""Train one model on one task, by itself on one device."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.record import hardware_name
from longhorn_layers.model import LanguageModel
from pretrain.mqar.config import Cell, TrainingConfig
from pretrain.mqar.task import NOT_SCORED, TEST, TRAIN, Examples, make_examples
from pretrain.optim import parameter_groups
from pretrain.provenance import code_commit

LOGITS_AT_A_TIME = 1 << 26  # of an evaluation's forward pass: 256 MiB in fp32


@dataclass(frozen=True)
class CellResult:
    """What became of a cell. `accuracy` is of the test examples' queries, after the last epoch."""

    key: str
    cell: dict[str, Any]  # its settings
    accuracy: float
    epochs: int  # trained: fewer than asked for where it stopped early
    diverged: bool  # a loss was not finite, and training ended there
    train_loss: float | None  # nats per query, mean of the last epoch; None: not finite
    parameters: int
    state_numbers: int  # that a sequence leaves behind in all layers: what recall has to come from
    seconds: float
    commit: str | None = None  # of the code that trained it
    hardware: str = ""


def train_cell(cell: Cell, device: torch.device) -> CellResult:
    """Train until an epoch ends at `stop_accuracy` or better, or all epochs are done.

    The seed decides weights, data and order: on one CPU thread the result is the same to the last bit.
    """
    start = time.perf_counter()
    training = cell.training
    torch.manual_seed(cell.seed)
    model = LanguageModel(cell.model_config())
    torch.nn.init.normal_(model.embedding.weight, std=training.embedding_std)
    model = model.to(device)
    train, test = (_examples(cell, part, device) for part in (TRAIN, TEST))
    batches = training.train_examples // cell.task.batch_size
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=cell.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(training, batches * training.epochs))
    epoch, score, loss = 0, 0.0, math.inf
    while epoch < training.epochs and score < training.stop_accuracy and (epoch == 0 or math.isfinite(loss)):
        loss = _train_epoch(model, train, cell, optimizer, schedule)
        score, epoch = accuracy(model, test), epoch + 1
    return CellResult(
        key=cell.key,
        cell=asdict(cell),
        accuracy=score,
        epochs=epoch,
        diverged=not math.isfinite(loss),
        train_loss=loss if math.isfinite(loss) else None,
        parameters=sum(p.numel() for p in model.parameters()),
        state_numbers=state_numbers(model, test.inputs[:1]),
        seconds=time.perf_counter() - start,
        commit=code_commit(),
        hardware=hardware_name(device),
    )


def _train_epoch(
    model: LanguageModel,
    examples: Examples,
    cell: Cell,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Each example once, in an order of its own; returns the mean loss in nats per query."""
    total = torch.zeros((), device=examples.inputs.device)
    for inputs, targets in _batches(examples, cell.task.batch_size):
        loss = model(inputs, targets) / (len(inputs) * cell.task.pairs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cell.training.clip)
        optimizer.step()
        schedule.step()
        total += loss.detach()
    return total.item() / (len(examples.inputs) // cell.task.batch_size)


def _batches(examples: Examples, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches in a random order; what does not fill one is left out this time."""
    order = torch.randperm(len(examples.inputs)).to(examples.inputs.device)
    for chosen in order.split(size)[: len(order) // size]:
        yield examples.inputs[chosen], examples.targets[chosen]


@torch.no_grad()
def accuracy(model: LanguageModel, examples: Examples) -> float:
    """The share of queries whose value has the highest logit."""
    rows = max(1, LOGITS_AT_A_TIME // (examples.inputs.shape[1] * model.config.padded_vocab_size))
    right = torch.zeros((), dtype=torch.int64, device=examples.inputs.device)
    for inputs, targets in zip(examples.inputs.split(rows), examples.targets.split(rows), strict=True):
        right += (model(inputs).argmax(dim=-1) == targets).sum()
    return right.item() / int((examples.targets != NOT_SCORED).sum())


@torch.no_grad()
def state_numbers(model: LanguageModel, input_ids: Tensor) -> int:
    """How many numbers of state one sequence leaves in all layers: the scan's and convolution's, or keys and values."""
    state = model.new_state(1)
    model(input_ids, state=state)
    values = [value for layer in state.layers for value in vars(layer).values()]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def _examples(cell: Cell, part: int, device: torch.device) -> Examples:
    training = cell.training
    count = training.train_examples if part == TRAIN else training.test_examples
    made = make_examples(cell.task, training.vocab_size, count, training.power, cell.seed, part)
    return Examples(made.inputs.to(device), made.targets.to(device))


def _shape(training: TrainingConfig, steps: int) -> Callable[[int], float]:
    """Step → factor of the learning rate: a linear warm-up, then a cosine to 0."""
    warmup = training.warmup_fraction * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return factor

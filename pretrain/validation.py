"""The loss over held-out data while a run trains."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from longhorn_layers.model import LanguageModel
from pretrain.config import Config, ConfigError, validation_contexts
from pretrain.data import IGNORED, open_data, token_stream, windows
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.zero import ZeroEngine


class ValidationLoss:
    """Mean loss over the first eval.tokens of the validation data, at the training context and at eval.contexts.

    The same targets are scored at every context. A window that is longer than the training context is walked in parts
    of that length with the state carried over: validation takes no more memory than a micro-batch (but for attention's
    state, which is all keys and values of its windows so far).
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        dataset = open_data(config.data.valid, "data.valid", config.model.vocab_size)
        self.config, self.mesh = config, mesh
        self.stream = token_stream(dataset, config.eval.tokens + 1)
        self.contexts = validation_contexts(config)
        longest = self.contexts[-1]
        self.targets = (len(self.stream) - 1) // longest * longest
        if self.targets == 0:
            key = "data.seqlen" if longest == config.data.seqlen else "eval.contexts"
            raise ConfigError(
                f"data.valid={config.data.valid} holds {dataset.tokens} tokens and eval.tokens={config.eval.tokens}: "
                f"no window of {key}={longest} fits; set eval.interval=0 to train without validation"
            )

    def measure(self, engine: ZeroEngine, interrupted: Callable[[], bool] = lambda: False) -> dict[int, float] | None:
        """Nats per token by context, over the same windows whatever the number of ranks.

        None where `interrupted`, asked after each forward and answered alike on all ranks, says so.
        """
        losses = {}
        with engine.evaluating() as model:
            for context in self.contexts:
                total = 0.0
                for rows in self._batches(context):
                    for part in self._walk(engine, model, context, rows):
                        total += part
                        if interrupted():
                            return None
                [total] = self.mesh.all_reduce([total])
                losses[context] = total / self.targets
        return losses

    def _batches(self, context: int) -> Iterator[range]:
        """Windows of this rank's forwards, as many forwards on every rank; an empty range past the end."""
        count, ranks = self.targets // context, self.mesh.data_size
        fitting = self.config.train.micro_batch_size * max(1, self.config.data.seqlen // context)
        rounds = -(-count // (fitting * ranks))
        size = -(-count // (rounds * ranks))  # no more than shares them evenly
        for i in range(rounds):
            start = (i * ranks + self.mesh.data_rank) * size
            yield range(start, max(start, min(start + size, count)))

    def _walk(self, engine: ZeroEngine, model: Any, context: int, rows: range) -> Iterator[float]:
        """The summed loss of each part of the windows.

        Every rank runs the same number of forwards, as ZeRO-3 gathers parameters in each: past the end, a rank runs a
        window and scores nothing of it.
        """
        part, device = self.config.data.seqlen, self.mesh.device
        ids, targets = windows(self.stream, context, rows or range(1))
        if not rows:
            targets = torch.full_like(targets, IGNORED)
        state = cast(LanguageModel, engine.module).new_state(len(ids)) if context > part else None
        for inputs, following in zip(ids.split(part, 1), targets.split(part, 1), strict=True):
            yield float(model(inputs.to(device), following.to(device), state=state))

"""The loss over held-out data while a run trains."""

from collections.abc import Callable

import torch

from pretrain.config import Config, ConfigError
from pretrain.data import IGNORED, open_data, token_stream, windows
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.zero import ZeroEngine


class ValidationLoss:
    """Mean loss over the first eval.tokens of the validation data, in windows of the training context."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        dataset = open_data(config.data.valid, "data.valid", config.model.vocab_size)
        self.config, self.mesh = config, mesh
        self.stream = token_stream(dataset, config.eval.tokens + 1)
        seqlen = config.data.seqlen
        self.count = (len(self.stream) - 1) // seqlen
        if self.count == 0:
            raise ConfigError(
                f"data.valid={config.data.valid} holds {dataset.tokens} tokens and eval.tokens={config.eval.tokens}: "
                f"no window of data.seqlen={seqlen} fits; set eval.interval=0 to train without validation"
            )

    def measure(self, engine: ZeroEngine, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Nats per token over the same windows whatever the number of ranks.

        None where `interrupted`, asked after each batch and answered alike on all ranks, says so.
        """
        size, ranks = self.config.train.micro_batch_size, self.mesh.data_size
        total, scored = 0.0, 0.0
        with engine.evaluating() as model:
            # Every rank runs the same number of forwards, as ZeRO-3 gathers parameters in each: past the end, a
            # rank runs a window and scores nothing of it.
            for start in range(self.mesh.data_rank * size, self.count + (-self.count) % (size * ranks), size * ranks):
                rows = range(start, min(start + size, self.count))
                ids, targets = windows(self.stream, self.config.data.seqlen, rows or range(1))
                if not rows:
                    targets = torch.full_like(targets, IGNORED)
                total += float(model(ids.to(self.mesh.device), targets.to(self.mesh.device)))
                scored += float((targets != IGNORED).sum())
                if interrupted():
                    return None
        total, scored = self.mesh.all_reduce([total, scored])
        return total / scored

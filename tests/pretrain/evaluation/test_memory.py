"""A window's length costs no memory: 131072 tokens take what 8192 take."""

import subprocess
import sys
from pathlib import Path

# One process, as the peak only ever grows: what the second walk adds to it.
WALK = """
import resource
import numpy as np
import torch
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.evaluation.losses import evaluate_contexts

torch.set_num_threads(1)
model = LanguageModel(ModelConfig(LonghornConfig(d_state=2), vocab_size=512, d_model=16, n_layer=1)).eval()
stream = np.random.default_rng(0).integers(0, 512, 131073, dtype=np.uint16)
for context in (8192, 131072):
    [result] = evaluate_contexts(model, stream, [context], batch_tokens=8192, chunk=1024)
    assert result.tokens == 131072 and result.positions[-1].last == context
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
ALL_LOGITS = 131072 * 512 * 4 / 1024  # of one window, in KiB


def test_peak_memory_does_not_depend_on_the_context() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", WALK], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert long - short < 8 * 1024 < ALL_LOGITS / 30  # KiB; one layer's activations of a window would be 20,000 too

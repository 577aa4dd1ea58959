"""Run under torchrun by test_validation.py: the validation losses of each case, written by rank 0.

torchrun … validation_worker.py CONFIGS.json OUTPUT.json
"""

import json
import sys
from pathlib import Path

import torch

from pretrain.config import config_from_dict
from pretrain.parallel.mesh import join_world, split_world
from pretrain.parallel.zero import ZeroEngine
from pretrain.trainer import build_model
from pretrain.validation import ValidationLoss


def main() -> None:
    torch.set_num_threads(1)
    configs, output, found = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), []
    with join_world() as device:
        for values in configs:
            config = config_from_dict(values)
            with split_world(config.parallel.tensor, device) as mesh:
                engine = ZeroEngine(build_model(config, mesh), config, mesh)
                found.append(ValidationLoss(config, mesh).measure(engine))
                if mesh.rank == 0:
                    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

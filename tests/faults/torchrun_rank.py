"""A rank with faults under the real torchrun: `torchrun … torchrun_rank.py FAULTS.json LOG CONFIG [key=value …]`."""

import json
import os
import sys
from pathlib import Path

from faults import Fault, install

from pretrain.train import main

if __name__ == "__main__":
    faults = [Fault(**fault) for fault in json.loads(Path(sys.argv[1]).read_text())]
    install(faults, int(os.environ["RANK"]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))

"""Checkpoints of fragments: each rank's slices of fp32 masters and Adam's moments, with their place in the whole.

    RUN/checkpoints/step_00000500/rank_00000.safetensors   "<parameter>|<master, exp_avg or exp_avg_sq>", "rng|…"
                                  manifest.json            what the fragments are, sizes and hashes, config, data
                                  manifest.sha256          the manifest's own
    RUN/latest                                             the newest one's name

Written under a temporary name, synced, then renamed: a folder without a complete manifest does not exist for the
loader. Fragments fit any tensor-parallel size, data-parallel size and ZeRO stage (DeepSpeed's own checkpoints do
not, and are not safe: DESIGN §10).

    format     what a manifest holds          save       copy to host memory, write in the background
    retention  which ones are kept            find       verify, fall back, agree on one
    load       into any topology, or one device        imported   a first one, of a model that was made elsewhere
"""

from pretrain.checkpoint.find import choose, newest, resolve, set_back, verify
from pretrain.checkpoint.format import CheckpointError, CheckpointManifest, Progress, read_manifest, step_name
from pretrain.checkpoint.imported import check_new_run, write_imported
from pretrain.checkpoint.load import LoadedModel, check_allowed, load, load_model
from pretrain.checkpoint.save import CheckpointWriter, SaveReport

__all__ = [
    "CheckpointError",
    "CheckpointManifest",
    "CheckpointWriter",
    "LoadedModel",
    "Progress",
    "SaveReport",
    "check_allowed",
    "check_new_run",
    "choose",
    "load",
    "load_model",
    "newest",
    "read_manifest",
    "resolve",
    "set_back",
    "step_name",
    "verify",
    "write_imported",
]

"""Starting runs: Slurm scripts, the check of their nodes, presets, the demo. Nothing imports it."""

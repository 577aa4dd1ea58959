"""Several models trained on the same data in the same order, and one report on them. The command is `__main__`."""

"""Models as folders that transformers reads, and back.

layouts   where other codes keep each parameter    mapping   what a mixer is in transformers, its config both ways
folder    reading: weights, training.json          export    writing, with a card (card)
official  the Longhorn authors' checkpoints        check     a written folder against the model (user.py, elsewhere)
"""


class ConversionError(ValueError):
    """A folder that is not the model it should be, or can't become one; the message names what is wrong with it."""

"""What every report does with its files: pictures to bytes, and all of them whole on disk."""

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from data_tools.files import write_durably

DPI = 150


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()


def write_files(output: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Each whole or not at all; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_durably(output / name, content)
    return [output / name for name in contents]

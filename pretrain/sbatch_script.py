"""What an sbatch script asks Slurm for, read off its `#SBATCH` lines."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import ConfigError

SHORT = {"N": "nodes", "t": "time", "J": "job-name", "o": "output", "e": "error", "p": "partition", "n": "ntasks"}
CONFIG_DEFAULT = re.compile(r"^CONFIG=\$\{CONFIG:-(.+?)\}", re.MULTILINE)
SIGNAL = re.compile(r"(?P<batch>[RB]*:)?(?:SIG)?(?P<name>\w+)(?:@(?P<seconds>\d+))?")
SIGNAL_SECONDS = 60  # Slurm's, where the option names none
# Days apart, a time is minutes, minutes:seconds or hours:minutes:seconds; after days, hours[:minutes[:seconds]].
UNITS, UNITS_AFTER_DAYS = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}, (3600, 60, 1)


@dataclass(frozen=True)
class Signal:
    """What Slurm sends before the time limit, and how long before."""

    name: str
    to_batch_shell: bool
    seconds: int


@dataclass(frozen=True)
class SbatchScript:
    """`options` by their long names, "" for a flag; `config` is what the script trains unless CONFIG is set."""

    path: Path
    options: dict[str, str]
    config: str | None

    @classmethod
    def read(cls, path: Path) -> "SbatchScript":
        """Raises ConfigError where there is no such script, or it has no #SBATCH line."""
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"--slurm {path}: {error.strerror}; there are launch/1p3b.sh and others") from error
        options = _options(text)
        if not options:
            raise ConfigError(f"--slurm {path}: no #SBATCH line before its first command")
        default = CONFIG_DEFAULT.search(text)
        return cls(path, options, default[1] if default else None)

    @property
    def nodes(self) -> int | None:
        return self._count("nodes")

    @property
    def gpus_per_node(self) -> int | None:
        return self._count("gpus-per-node") or self._count("gres")

    @property
    def time_limit(self) -> int | None:
        """Seconds; None where the partition's applies. Raises ConfigError where it is no time."""
        text = self.options.get("time")
        return None if text is None else _seconds(text, f"{self.path}: --time")

    @property
    def signal(self) -> Signal | None:
        found = SIGNAL.fullmatch(self.options.get("signal", ""))
        if found is None:
            return None
        return Signal(found["name"], "B" in (found["batch"] or ""), int(found["seconds"] or SIGNAL_SECONDS))

    def _count(self, name: str) -> int | None:
        """The number in 4, 2-4 (the least that starts), h100:8 or gpu:h100:8."""
        text = self.options.get(name)
        if text is None:
            return None
        found = re.fullmatch(r"(?:[a-z][\w-]*:)*(\d+)(?:-\d+)?", text)
        if found is None or int(found[1]) < 1:
            raise ConfigError(f"{self.path}: --{name}={text} holds no number that can be read")
        return int(found[1])


def _options(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break  # Slurm reads no further than the first command
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line, comments=False)[1:]
        while words and not words[0].startswith("#"):
            name, equals, value = words.pop(0).partition("=")
            if not equals and words and not words[0].startswith(("-", "#")):
                value = words.pop(0)
            name = name.lstrip("-")
            options[SHORT.get(name, name)] = value
    return options


def _seconds(text: str, what: str) -> int | None:
    """None for no limit."""
    if text.upper() in ("0", "INFINITE", "UNLIMITED"):
        return None
    days, dash, rest = text.partition("-") if "-" in text else ("0", "", text)
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (days, *parts)) or len(parts) > 3:
        raise ConfigError(f"{what}={text} is no time; Slurm reads 24:00:00, 2-12:00 or minutes")
    units = UNITS_AFTER_DAYS if dash else UNITS[len(parts)]
    return int(days) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))

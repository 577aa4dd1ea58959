"""A node's GPUs as nvidia-smi sees them: how many, and in which state."""

from dataclasses import dataclass
from typing import Self

from launch.preflight.command import CommandError, ask
from launch.preflight.findings import Finding, setting

NVIDIA_SMI_SECONDS = 25.0  # by default: eight GPUs without persistence mode take ten
FIELDS = (
    *("name", "uuid", "driver_version", "ecc.errors.uncorrected.volatile.total"),
    *("clocks.sm", "clocks.max.sm", "temperature.gpu", "memory.used"),
)
# What drivers have called the same bits, the newer name first.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
NOT_COUNTED = ("N/A", "[N/A]", "[Not Supported]", "")
HOT_CELSIUS = 85  # the GPUs are idle
USED_MIB = 4096  # a driver and its daemons hold some hundreds


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi's answer; a figure is None where this GPU does not count it."""

    index: int
    name: str
    uuid: str
    driver: str
    ecc_errors: int | None
    clock: int | None
    max_clock: int | None
    celsius: int | None
    used_mib: int | None
    slowdowns: tuple[str, ...]
    unreadable: tuple[str, ...]  # figures that the driver could not read, like "[GPU requires reset]"

    @classmethod
    def parse(cls, index: int, line: str) -> Self:
        """Raises CommandError for a line of another number of fields."""
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(FIELDS) + 1:
            raise CommandError(f"nvidia-smi: cannot read {line!r}")
        numbers = [_number(value) for value in values[3:]]
        errors, clock, max_clock, celsius, used, reasons = (n if isinstance(n, int) else None for n in numbers)
        slow = tuple(name for bit, name in SLOWDOWNS.items() if (reasons or 0) & bit)
        unreadable = tuple(n for n in numbers if isinstance(n, str))
        name, uuid, driver = values[:3]
        return cls(index, name, uuid, driver, errors, clock, max_clock, celsius, used, slow, unreadable)

    def problems(self) -> list[str]:
        found = [f"nvidia-smi reads {value}" for value in sorted(set(self.unreadable))]
        if self.ecc_errors:
            found.append(f"{self.ecc_errors} uncorrected ECC errors")
        if self.slowdowns:
            found.append(f"slowed down to {self.clock} of {self.max_clock} MHz ({', '.join(self.slowdowns)})")
        if self.celsius is not None and self.celsius >= HOT_CELSIUS:
            found.append(f"{self.celsius} °C while idle")
        if self.used_mib is not None and self.used_mib > USED_MIB:
            found.append(f"{self.used_mib} MiB in use: another process holds it")
        return [f"GPU {self.index}: {problem}" for problem in found]


def _number(text: str) -> int | str | None:
    """None where there is no such figure; the text where it is no number."""
    if text in NOT_COUNTED:
        return None
    try:
        return int(text, 0)
    except ValueError:
        return text


def query() -> list[Gpu]:
    """Raises CommandError where nvidia-smi is missing, fails or hangs."""
    seconds = setting("NVIDIA_SMI_SECONDS", NVIDIA_SMI_SECONDS)
    for reasons in REASONS:
        try:
            fields = ",".join((*FIELDS, reasons))
            text = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", seconds=seconds)
            break
        except CommandError as error:
            if reasons == REASONS[-1] or "not a valid field" not in str(error):
                raise
    return [Gpu.parse(i, line) for i, line in enumerate(text.splitlines()) if line.strip()]


def gpu_findings(gpus: list[Gpu], expected: int) -> list[Finding]:
    """Their number and state, and their driver."""
    problems = [problem for gpu in gpus for problem in gpu.problems()]
    if len(gpus) < expected:
        problems.insert(0, f"{len(gpus)} visible, needs {expected}")
    names = " + ".join(sorted({gpu.name for gpu in gpus}))
    hottest = max((gpu.celsius for gpu in gpus if gpu.celsius is not None), default=None)
    fine = f"{len(gpus)} × {names}, {'no temperature' if hottest is None else f'up to {hottest} °C'}"
    drivers = " + ".join(sorted({gpu.driver for gpu in gpus}))
    return [Finding.of("GPUs", problems, fine), Finding("driver", "ok" if drivers else "bad", drivers or "none", True)]

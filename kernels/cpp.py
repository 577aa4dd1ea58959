"""Build a C++ source once, on the machine that runs it, and load it with ctypes.

`-march=native` makes the result fit one kind of processor only, so the cache key holds the processor's
features beside the source with what it includes, the flags and the compiler: a home folder shared by
different nodes is safe, and so is a change in a shared header.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

# Not -ffast-math: it would treat NaN as impossible (a diverged run must show NaN, not hide it) and, when
# linking a shared object, old GCCs switch the whole process to flush-to-zero.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
]


def cache_root() -> Path:
    """What this machine keeps between runs: `$LONGHORN_CACHE`, else `~/.cache/longhorn`."""
    return Path(os.environ.get("LONGHORN_CACHE") or Path.home() / ".cache" / "longhorn")


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    return cache_root() / "cpp"


@cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Compile `source` (C++17, GCC or Clang vector extensions) unless cached, and load it.

    Returns None, after one warning that says why and what it costs, where no compiler is found or
    compilation fails: every op that calls this has a path in plain torch.
    """
    compiler = find_compiler()
    if compiler is None:
        _warn(source, "no C++ compiler (g++ or clang++, or $CXX) was found")
        return None
    try:
        library = cache_dir() / f"{source.stem}-{_cache_key(source, compiler)}.so"
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(source, getattr(error, "stderr", None) or str(error))
        return None


def _warn(source: Path, reason: str) -> None:
    warnings.warn(
        f"{source.parent.name}/{source.name} could not be built, the plain torch path runs instead (a scan is about "
        f"ten times slower on it): {reason.strip()}",
        RuntimeWarning,
        stacklevel=3,
    )


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def _cache_key(source: Path, compiler: str) -> str:
    parts = [*_texts(source), " ".join(FLAGS), _run([compiler, "--version"]), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _texts(source: Path) -> list[str]:
    """`source` and every header of ours that it includes, directly or not, each once."""
    texts: dict[Path, str] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path not in texts:
            texts[path] = path.read_text()
            included = re.findall(r'^\s*#\s*include\s*"(.+?)"', texts[path], re.MULTILINE)
            pending += [(path.parent / name).resolve() for name in included]
    return list(texts.values())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Build under a temporary name: of several processes that start at once, each sees a whole file or none."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, "-o", str(built), str(source)]
        _run(command)
        os.replace(built, library)


def _run(command: list[str]) -> str:
    """Its output. A signal meant for training (Ctrl-C, a time limit) must not end it: the torch path rounds otherwise.

    A session of its own keeps a terminal's signals off; Slurm's reach every process, so it is tried again.
    """
    for last_try in (False, False, False, False, True):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout
        except subprocess.CalledProcessError as error:
            if error.returncode >= 0 or last_try:  # below 0: ended by a signal, which says nothing of the compiler
                raise
    raise AssertionError("the last try returns or raises")

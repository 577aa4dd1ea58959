"""When a C++ source is built anew."""

from pathlib import Path

import pytest

from kernels import cpp


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/op.cpp includes shared/one.h, which includes two.h beside it; the cache is empty."""
    monkeypatch.setenv("LONGHORN_CACHE", str(tmp_path / "cache"))
    texts = {
        "a/op.cpp": '#include <cmath>\n#include "../shared/one.h"\nextern "C" int answer() { return ONE + TWO; }\n',
        "shared/one.h": '#pragma once\n  # include "two.h"\n#define ONE 1\n',
        "shared/two.h": '#pragma once\n#include "one.h"\n#define TWO 2\n',
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def answer(sources: Path) -> int:
    """As a new process would have it."""
    cpp.load_library.cache_clear()
    library = cpp.load_library(sources / "a" / "op.cpp")
    cpp.load_library.cache_clear()
    assert library is not None
    return library.answer()


def test_a_change_in_an_included_header_is_a_new_build(sources: Path) -> None:
    assert answer(sources) == 3
    (sources / "shared/two.h").write_text("#pragma once\n#define TWO 4\n")
    assert answer(sources) == 5
    assert len(list((sources / "cache/cpp").glob("*.so"))) == 2


def test_an_unchanged_source_is_not_built_again(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(sources) == 3
    monkeypatch.setattr(cpp, "_compile", lambda *_: pytest.fail("compiled again"))
    assert answer(sources) == 3


def test_a_missing_header_warns(sources: Path) -> None:
    (sources / "shared/two.h").unlink()
    cpp.load_library.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"a/op\.cpp could not be built.*two\.h"):
        assert cpp.load_library(sources / "a" / "op.cpp") is None
    cpp.load_library.cache_clear()


INTERRUPTED = """#!/bin/sh
echo call >>"{calls}"
[ "$(wc -l <"{calls}")" -le {times} ] && kill -TERM $$
exec {compiler} "$@"
"""


@pytest.mark.parametrize(("times", "builds"), [(2, True), (9, False)])
def test_a_signal_that_hits_the_compiler_too(
    sources: Path, monkeypatch: pytest.MonkeyPatch, times: int, builds: bool
) -> None:
    """A stop in the first step is sent to every process of the job."""
    compiler = sources / "c++"
    text = INTERRUPTED.format(calls=sources / "calls", times=times, compiler=cpp.find_compiler())
    compiler.write_text(text)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    if builds:
        assert answer(sources) == 3
        return
    cpp.load_library.cache_clear()
    with pytest.warns(RuntimeWarning, match="died with"):
        assert cpp.load_library(sources / "a" / "op.cpp") is None
    cpp.load_library.cache_clear()

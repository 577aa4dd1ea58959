"""Who may import whom (DESIGN §3), and calls that run what a file or string says: read off syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room → what of this repository its files may import. Nothing imports launch or tests.
ROOMS = {
    "kernels": ("kernels",),
    "longhorn_layers": ("longhorn_layers", "kernels"),
    "data_tools": ("data_tools",),
    "pretrain": (
        *("pretrain", "kernels", "longhorn_layers"),
        *("data_tools.files", "data_tools.shards", "data_tools.tokenizer", "data_tools.dataset", "data_tools.index"),
        "data_tools.encoder",  # benchmarks/tokenize.py measures it
    ),
    "launch": ("launch.preflight", "kernels", "longhorn_layers", "data_tools", "pretrain"),
    "tests": ("kernels", "longhorn_layers", "data_tools", "pretrain"),
}
# Exported beside a checkpoint, where nothing of this repository may be at hand: they import each other, and kernels
# only in a `try`.
SHIPPED = tuple(
    f"longhorn_layers/hf/{name}.py" for name in ("configuration_*", "modeling_*", "recurrence", "recurrent_lm")
)
SIBLINGS = (".configuration_", ".modeling_", ".recurrence", ".recurrent_lm")
# Package → the only places that import it, tests apart.
CONFINED = {
    **dict.fromkeys(("triton", "flash_attn", "fla", "liger_kernel"), ("kernels/",)),
    "deepspeed": ("pretrain/parallel/zero.py",),
    "megatron": ("pretrain/parallel/",),
    "torch.distributed": ("pretrain/",),
}
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "shelve")
SHELLS = (
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    "asyncio.create_subprocess_shell",
)
EVALUATORS = ("eval", "exec", "builtins.eval", "builtins.exec")


def violations(path: str, source: str) -> list[str]:
    """What is wrong with `source`, were it the file `path` (relative to the root): "path:line: why"."""
    tree = ast.parse(source, path)
    found = [*_import_violations(path, tree), *_call_violations(tree)]
    return [f"{path}:{line}: {why}" for line, why in sorted(found)]


def _import_violations(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    room = path.partition("/")[0]
    shipped = any(Path(path).match(pattern) for pattern in SHIPPED)
    tried = _tried_lines(tree)
    for line, name in _imports(tree):
        if name.startswith("."):
            if not (shipped and name.startswith(SIBLINGS)):
                yield line, f"relative import of {name}; write it absolute"
        elif name.partition(".")[0] in ROOMS:
            if shipped and not (line in tried and _within(name, ("kernels",))):
                yield line, f"an exported file may not import {name}"
            elif not _within(name, ROOMS[room]):
                yield line, f"{room} may not import {name}"
        for package, places in CONFINED.items():
            if _within(name, (package,)) and room != "tests" and not path.startswith(places):
                yield line, f"only {', '.join(places)} may import {package}"
        if _within(name, PICKLES):
            yield line, f"{name}: reading a pickle runs what it says; use safetensors or JSON"


def _call_violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, aliases)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("torch.load", "torch.serialization.load") and not _is(keywords.get("weights_only"), True):
            yield node.lineno, "torch.load without weights_only=True"
        if name in SHELLS or ("shell" in keywords and not _is(keywords["shell"], False)):
            yield node.lineno, f"{name} runs a shell; pass subprocess a list of arguments"
        if name in EVALUATORS:
            yield node.lineno, f"{name} of a string"


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in the file; relative names keep their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((node.lineno, module + alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func, {}).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def _tried_lines(tree: ast.AST) -> set[int]:
    """Lines of statements in a `try` that goes on after an ImportError."""
    return {
        statement.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        and any(isinstance(h.type, ast.Name) and h.type.id == "ImportError" for h in node.handlers)
        for statement in node.body
    }


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name → full name, of absolute imports."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`a.b.c` of an attribute chain, "?.c" where it starts with anything but a name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return "?"


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("room", ROOMS)
def test_room_keeps_the_rules(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no Python file in {room}/: nothing was checked"
    found = [v for f in files for v in violations(f.relative_to(ROOT).as_posix(), f.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_every_package_is_a_room() -> None:
    packages = {init.parent.name for init in ROOT.glob("*/__init__.py")}
    assert packages <= ROOMS.keys()
    assert {"kernels", "longhorn_layers", "data_tools", "pretrain"} <= packages


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("kernels/a.py", "import longhorn_layers.model", "kernels may not import longhorn_layers.model"),
        ("kernels/a.py", "def f():\n    from pretrain import config", "a.py:2: kernels may not import"),
        ("longhorn_layers/a.py", "from data_tools import shards", "may not import data_tools.shards"),
        ("longhorn_layers/a.py", "import torch.distributed as dist", "only pretrain/ may import"),
        ("longhorn_layers/a.py", "from torch import distributed", "only pretrain/ may import"),
        ("longhorn_layers/hf/modeling_a.py", "from kernels import cpp", "an exported file may not import"),
        ("longhorn_layers/hf/modeling_a.py", "from . import tokenizer", "relative import of .tokenizer"),
        (
            "longhorn_layers/hf/modeling_a.py",
            "try:\n    from longhorn_layers import model\nexcept ImportError:\n    model = None",
            "an exported file may not import",
        ),
        ("data_tools/a.py", "import kernels", "data_tools may not import kernels"),
        ("pretrain/a.py", "import data_tools", "pretrain may not import data_tools"),
        ("pretrain/a.py", "from data_tools.readers import x", "may not import data_tools.readers.x"),
        ("pretrain/a.py", "from data_tools.shards_old import x", "may not import data_tools.shards_old.x"),
        ("pretrain/a.py", "import launch.preflight", "pretrain may not import launch.preflight"),
        ("pretrain/a.py", "from .config import Config", "relative import of .config.Config"),
        ("pretrain/a.py", "import importlib\nimportlib.import_module('tests.x')", "may not import tests.x"),
        ("tests/a/test_b.py", "from tests import conftest", "tests may not import tests.conftest"),
        (
            "longhorn_layers/a.py",
            "try:\n    import triton.language\nexcept E: pass",
            "only kernels/ may",
        ),
        ("longhorn_layers/a.py", "from fla.ops import gla", "only kernels/ may import fla"),
        ("pretrain/parallel/mesh.py", "import deepspeed", "only pretrain/parallel/zero.py may import"),
        ("pretrain/trainer.py", "from megatron import core", "may import megatron"),
        ("data_tools/shards.py", "from megatron.core import x", "may import megatron"),
        ("tests/a.py", "from pickle import loads", "pickle.loads: reading a pickle"),
        ("pretrain/a.py", "import torch\ntorch.load(f)", "a.py:2: torch.load without weights_only=True"),
        ("pretrain/a.py", "import torch as t\nt.load(f, weights_only=False)", "torch.load without"),
        ("pretrain/a.py", "from torch import load as read\nread(f)", "torch.load without"),
        ("data_tools/a.py", "import subprocess as s\ns.run(c, shell=True)", "subprocess.run runs a shell"),
        ("data_tools/a.py", "run(c, shell=flag)", "run runs a shell"),
        ("data_tools/a.py", "from os import system\nsystem('ls')", "os.system runs a shell"),
        ("pretrain/a.py", "exec(open(f).read())", "exec of a string"),
        ("pretrain/a.py", "class A:\n    x = eval(text)", "a.py:2: eval of a string"),
    ],
)
def test_bad_examples_are_refused(path: str, source: str, why: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a/b.py", "import triton\nfrom kernels.cpp import load_library"),
        ("longhorn_layers/hf/modeling_a.py", "from .configuration_a import C\nimport transformers"),
        (
            "longhorn_layers/hf/modeling_a.py",
            "try:\n    from kernels import cpp\nexcept ImportError:\n    cpp = None",
        ),
        ("longhorn_layers/hf/a.py", "from longhorn_layers.hf.configuration_a import C"),
        ("pretrain/parallel/zero.py", "import deepspeed\nfrom megatron.core import parallel_state"),
        ("pretrain/a.py", "from data_tools import shards\nfrom data_tools.tokenizer import Tokenizer"),
        ("pretrain/parallel/a.py", "from megatron.core import tensor_parallel"),
        ("tests/kernels/test_a.py", "import triton, deepspeed\nimport launchpad, flax"),
        ("pretrain/a.py", "engine.eval()\nmodel.train().eval()\njson.load(f)\nself.load(f)"),
        ("pretrain/a.py", "import torch\ntorch.load(f, weights_only=True)"),
        ("pretrain/a.py", "import subprocess\nsubprocess.run(['ls'], shell=False)"),
        ("pretrain/a.py", "'import pickle, eval(x)'  # import launch"),
    ],
)
def test_good_examples_pass(path: str, source: str) -> None:
    assert violations(path, source) == []

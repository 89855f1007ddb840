"""The house: imports point one way, rooms have no cycles, the core needs the core packages alone."""

import ast
import sys
from pathlib import Path

import pytest

LMLIB = Path(__file__).parents[1] / "lmlib"
FILES = sorted(LMLIB.rglob("*.py"))
GROUND = ("errors", "files", "text", "leaks", "parameters", "intervals")
# Each room may import from those before it and from its own line.
LAYERS = [
    GROUND, ("config", "audit"), ("distributed",), ("data", "model", "optim", "evaluation"),
    ("checkpoint", "generation"), ("run",), ("training",), ("analysis", "sweep", "tools"), ("notebook",),
    ("cli",), ("__init__", "__main__"),
]  # fmt: skip
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
EXCEPTION = ("training", "analysis")  # it draws the curves at its end, if they can be drawn
EXTRAS = {"analysis", "notebook", "cli"}  # rooms that may need the extra `notebook`
CORE = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "yaml"}
CORE |= {"filelock"}


def room_of(file: Path) -> str:
    return file.relative_to(LMLIB).with_suffix("").parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Full names of all that is imported: "lmlib.run.lock", "torch.nn"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(file: Path, source: str) -> list[str]:
    """What breaks the import law in a file of lmlib with this source."""
    room, tree, found = room_of(file), ast.parse(source), []
    for name in imports(tree):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package == "lmlib" and other in RANK and other != room:
            allowed = RANK[other] <= RANK[room] and not (room == "audit" and other not in GROUND)
            if not allowed and (room, other) != EXCEPTION:
                found.append(f"{room} imports {other}")
    at_top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    for name in imports(tree if room in {*GROUND, "config"} else at_top):
        package = name.split(".")[0]
        is_known = package in sys.stdlib_module_names or package in CORE or package == "lmlib"
        if not is_known and room not in EXTRAS:
            found.append(f"{room} needs {package}")
        if room in GROUND and package in CORE - {"yaml"}:
            found.append(f"{room}, the ground, needs {package}")
    found += [
        f"line {n} has {len(line)} characters" for n, line in lines(source) if len(line) > 100
    ]
    found += ["more than 350 lines"] if source.count("\n") > 350 else []
    return found


def lines(source: str) -> list[tuple[int, str]]:
    return list(enumerate(source.splitlines(), 1))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(LMLIB).as_posix())
def test_file_keeps_the_law(file):
    assert violations(file, file.read_text("utf-8")) == []


def test_rooms_on_one_layer_have_no_cycle():
    arrows = {}
    for file in FILES:
        names = {
            name.split(".")[1] for name in imports(ast.parse(file.read_text())) if "lmlib." in name
        }
        arrows.setdefault(room_of(file), set()).update(names & RANK.keys() - {room_of(file)})
    arrows["training"].discard("analysis")
    seen = set()
    while ready := {room for room in arrows.keys() - seen if arrows[room] <= seen}:
        seen |= ready
    assert seen == arrows.keys(), f"a cycle among {sorted(arrows.keys() - seen)}"


@pytest.mark.parametrize(
    ("place", "line", "said"),
    [
        ("data/corpus.py", "from lmlib.run import lock", "data imports run"),
        ("files.py", "import torch", "files, the ground, needs torch"),
        ("audit/probe.py", "from lmlib.config import RunConfig", "audit imports config"),
        ("run/start.py", "import pandas", "run needs pandas"),
        (
            "analysis/frames.py",
            "from lmlib.notebook.live import watch",
            "analysis imports notebook",
        ),
        ("text.py", "x = '" + 100 * "x" + "'", "line 1 has 106 characters"),
    ],
)
def test_a_broken_law_is_found(place, line, said):
    assert violations(LMLIB / place, line + "\n") == [said]


def test_no_benchmark_hides_a_standard_module():
    """A script's own folder comes first on its path: there, `tokenize.py` would break `inspect`."""
    names = {file.stem for file in (LMLIB.parent / "benchmarks").glob("*.py")}
    assert not names & sys.stdlib_module_names, "rename it"

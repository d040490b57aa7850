"""The structure of the repository: the top level, who imports whom, how long things are."""

from __future__ import annotations

import ast
import itertools
import subprocess

import pytest
from helpers import REPO

SCRIPTS = ("train", "sample", "prepare")
POSTTRAINING = ("rl", "pairs", "reward", "dpo")
COMMANDS = (
    "plot",
    "bench",
    "export",
    "evaluate",
    "arithmetic",
    "reference",
    "scaling",
    "serve",
    *POSTTRAINING,
)
TOP_LEVEL = {
    *("model.py", "train.py", "sample.py", "prepare.py", "config", "data", "README.md", "tests"),
    *("pyproject.toml", "quill", "docs", "lecture", ".ci", ".gitignore", "LICENSE"),
}
# A module may import from rooms with a lower number, and from its own room.
GROUND = ("errors", "files", "startup", "settings")
ROOMS = {"data": 1, "training": 2, "sampling": 3, "interop": 3, "posttraining": 4, "views": 4}
TOP_ROOM = 5  # the commands and scripts

READING_PATH = {
    *("model.py", "train.py", "sample.py", "prepare.py"),
    *("quill/data/dataset.py", "quill/training/optimizers.py"),
}
MAX_READING_PATH_LINES = 1900
MAX_FUNCTION_LINES = 60

EXTRAS = ("matplotlib", "safetensors", "tokenizers", "wandb", "torch.utils.tensorboard", "pyarrow")
EXTRAS += ("pydantic", "starlette", "uvicorn")
NOT_EVERYWHERE = ("fcntl", "readline", "resource")  # modules of some operating systems
# Start-up time: preparing a text and drawing losses need no torch, which takes a second and 200 MB;
# only a download needs requests, which takes longer than all else that prepares Tiny
# Shakespeare; one process alone shards no tensors.
LAZY = {
    ("prepare.py", "quill.interop.pretrained"),
    ("prepare.py", "quill.data.download"),
    ("quill/data/tokenizers.py", "requests"),
    ("quill/training/distributed.py", "torch.distributed"),
    ("quill/plot.py", "quill.views"),
    ("quill/serve.py", "quill.views"),  # which imports the extra `web` at the top
}


def sources() -> dict[str, ast.Module]:
    """-> by path, the program: model.py, the scripts and quill/."""
    paths = [*REPO.glob("*.py"), *(REPO / "quill").rglob("*.py")]
    return {str(path.relative_to(REPO)): ast.parse(path.read_text()) for path in sorted(paths)}


SOURCES = sources()


def imports(tree: ast.Module) -> list[tuple[ast.stmt, str]]:
    """-> each import of a module, or of a name from it, as its full dotted name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def name_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


def own_imports(path: str) -> set[str]:
    """-> the modules of this repository that the file imports."""
    found = set()
    for _, name in imports(SOURCES[path]):
        parts = name.split(".")
        known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found |= {name for name in known[:2] if name in MODULES and name != "quill"}
    return {name for name in found if not MODULES[name].endswith("__init__.py")}


def room_of(module: str) -> int:
    parts = module.split(".")
    if parts[0] == "model":
        return 0
    if parts[0] in SCRIPTS or (len(parts) == 2 and parts[1] in (*COMMANDS, "__main__")):
        return TOP_ROOM
    assert parts[0] == "quill", f"{module} has no room"
    if len(parts) == 2:
        assert parts[1] in GROUND, f"{module} belongs to no room"
        return 0
    return ROOMS[parts[1]]


def test_the_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


@pytest.mark.parametrize("path", [*SOURCES])
def test_imports_point_down(path):
    module = name_of(path)
    if module.startswith("quill") and path.endswith("__init__.py"):
        assert not imports(SOURCES[path]), "importing a package imports nothing else"
        return
    for other in own_imports(path):
        if (module, other) == ("quill.bench", "train"):  # it times what train does
            continue
        assert module != "model", "model.py imports torch alone"
        is_same_room = module.rpartition(".")[0] == other.rpartition(".")[0] != ""
        is_ground = room_of(module) == room_of(other) == 0
        assert room_of(other) < TOP_ROOM, f"{module} imports the command or script {other}"
        assert room_of(other) < room_of(module) or is_same_room or is_ground, other


def test_model_imports_torch_alone():
    allowed = {"torch", "dataclasses", "math", "typing", "collections", "__future__"}
    assert {name.split(".")[0] for _, name in imports(SOURCES["model.py"])} <= allowed


def test_no_circles():
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("path", [*SOURCES])
def test_imports_stand_at_the_top(path):
    top = {id(node) for node in SOURCES[path].body}
    for node, name in imports(SOURCES[path]):
        is_lazy = any(path == p and name.startswith(n) for p, n in LAZY)
        is_allowed = is_lazy or name.startswith((*EXTRAS, *NOT_EVERYWHERE))
        assert id(node) in top or is_allowed, f"line {node.lineno} imports {name} inside"


@pytest.mark.parametrize("path", [*SOURCES])
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.FunctionDef):
            n_lines = node.end_lineno - node.lineno + 1
            assert n_lines <= MAX_FUNCTION_LINES, f"{node.name} has {n_lines} lines"


def test_the_reading_path_is_short():
    assert len([*READING_PATH]) == 6
    n_lines = sum((REPO / path).read_text().count("\n") for path in READING_PATH)
    assert n_lines <= MAX_READING_PATH_LINES


def test_these_tests_see_what_they_forbid():
    """The rules of this file, on imports that break them."""
    tree = ast.parse("import a.b\nfrom c import d, e\ndef f():\n    import g\n")
    assert [name for _, name in imports(tree)] == ["a.b", "c.d", "c.e", "g"]
    assert room_of("quill.training.log") > room_of("quill.data.dataset") > room_of("quill.files")
    assert room_of("quill.bench") == room_of("train") > room_of("quill.views.curves")
    assert "quill.training.checkpoint" in own_imports("train.py")
    assert "quill.data.dataset" in own_imports("train.py")
    pairs = itertools.pairwise(["model", "quill.training.models", "quill.bench"])
    assert all(a in own_imports(MODULES[b]) for a, b in pairs)

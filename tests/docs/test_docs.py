"""README and docs/: each command is read by that command's own options, each link is followed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from helpers import REPO, SCRIPTS
from torch.distributed.run import get_args_parser

from quill import settings
from quill.errors import InputError

PAGES = [REPO / "README.md", REPO / "data/README.md", *sorted((REPO / "docs").glob("*.md"))]
COMMANDS = (*SCRIPTS, "plot", "bench", "export", "evaluate", "arithmetic", "reference")
COMMANDS += ("scaling", "serve", "rl", "pairs", "reward", "dpo")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
A_COMMAND = re.compile(r"python3? |torchrun |--\w|config/\w+\.py|\.ci/\w+|.*&& python3? ")
# `path`, or `path`: `name`, `Class.name`
SOURCE = re.compile(
    r"`((?:quill|config|docs|lecture|tests)/[\w./]+|(?:model|train|sample|prepare)\.py)`"
    r"(?::((?:\s+`[\w.]+`,?)+))?"
)


# ---- commands ----------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    """Those of the bash blocks and code spans; also spans that begin with an option or a config."""
    blocks = [code for kind, code in FENCE.findall(text) if kind == "bash"]
    lines = [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    spans = (" ".join(span.split()) for span in re.findall("`([^`]+)`", FENCE.sub("", text)))
    lines += [span for span in spans if A_COMMAND.match(span)]
    return [command for line in lines for command in split(line)]


def split(line: str) -> list[str]:
    """The commands that `&&`, `;` and `|` join, without a comment."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    words.whitespace_split = True
    commands: list = [[]]
    for word in words:
        if word in ("&&", ";", "|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [shlex.join(words) for words in commands if words]


def check(command: str) -> None:
    """Raises an error for a command that Quill does not have, or does not have so."""
    words = [word for word in shlex.split(command) if not re.match("[A-Z_]+=", word)]
    match words:
        case ["torchrun", *argv]:
            run = get_args_parser().parse_args(argv)
            check(shlex.join(["python", run.training_script, *run.training_script_args]))
        case ["python", "-m", "pytest", *argv]:
            assert all((REPO / word).exists() for word in argv if word.startswith("tests"))
        case ["python", "-m", module, *argv]:
            read(module.removeprefix("quill."), argv)
        case ["python" | "python3", "-c" | "-m", *_]:
            pass
        case ["python", path, *argv] if path.removesuffix(".py") in SCRIPTS:
            read(path.removesuffix(".py"), argv)
        case ["python", path, *_]:
            assert (REPO / path).is_file()
        case [word, *_] if word.startswith(".ci/"):
            assert (REPO / word).is_file()
        case [word, *_] if word.startswith("config/"):
            read("train", words)
        case [word, *_] if word.startswith("--"):
            assert any(takes(name, words) for name in COMMANDS) or is_of_torchrun(words)


def read(name: str, argv: list[str]) -> None:
    """As the command does. Config files must be here, but for those of a nanoGPT beside it."""
    cls, how = declared(name)
    settings.load(cls, [word for word in argv if not word.startswith("nanoGPT/")], **how)


@functools.cache
def declared(name: str) -> tuple[type, dict]:
    """What the command's main gives to `settings.load`: the class of options, and keywords."""

    class LoadError(Exception):
        pass

    def load(cls, argv, **how):
        raise LoadError(cls, how)

    assert name in COMMANDS
    module = importlib.import_module(name if name in SCRIPTS else f"quill.{name}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadError) as called:
        patch.setattr(settings, "load", load)
        module.main([])
    return called.value.args


def takes(name: str, flags: list[str]) -> bool:
    """Whether the command has these options; of a lone `--key` only the name matters."""
    known = [f"--{field.name}" for field in dataclasses.fields(declared(name)[0])]
    try:
        read(name, [] if flags[0] in known and not flags[1:] else flags)
    except InputError:
        return False
    return True


def is_of_torchrun(flags: list[str]) -> bool:
    try:
        return bool(get_args_parser().parse_args([*flags, "train.py"]))
    except SystemExit:
        return False


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(REPO)


def found(find) -> list:
    """A parameter for everything that `find` finds in the text of a page."""
    return [
        pytest.param(page, part, id=f"{page.relative_to(REPO)}: {part}")
        for page in PAGES
        for part in dict.fromkeys(find(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("page, command", found(commands_of))
def test_every_command_is_one_that_runs(page, command):
    if "--help" not in command:
        check(command)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\npython train.py config/shakespeare_char_cpu.py --no_such=1\n```",
        "```bash\npython prepare.py && python sample.py \\\n    --out_dir=out --temperatur=1\n```",
        "```bash\nWANDB_MODE=offline python train.py --n_layer=six  # a comment\n```",
        "```bash\ntorchrun --standalone --nproc_per_node=2 train.py --paralel=fsdp\n```",
        "```bash\ntorchrun --no_such=2 train.py\n```",
        "the span `python train.py\nconfig/no_such.py` over two lines",
        "`head -c 9 a.txt > b.txt && python prepare.py mine --inputs=b.txt`",
        "`python prepare.py one two`",
        "`python -m quill.no_such`",
        "`python -m quill.export --out_dir=out my-gpt2 --dst=x`",
        "`python bench.py`",
        "`python lecture/no_such.py`",
        "`python -m pytest tests/no_such`",
        "`.ci/no_such A --out=figures`",
        "`config/shakespeare_char_cpu.py --no_such=1`",
        "`--mlp=no_such`",
        "`--no_such`",
    ],
)
def test_a_stale_command_is_found(text):
    with pytest.raises((InputError, AssertionError, SystemExit)):
        for command in commands_of(text):
            check(command)


# ---- links and names ---------------------------------------------------------------------------


def links_of(text: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    return [link for link in links if not link.startswith("https://")]


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall("^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page, link", found(links_of))
def test_every_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    assert not anchor or anchor in anchors_of(target)


@pytest.mark.parametrize("page, source", found(lambda text: [m[0] for m in SOURCE.finditer(text)]))
def test_every_source_that_is_named_has_what_is_said_to_be_in_it(page, source):
    path, names = SOURCE.match(source).groups()
    assert (REPO / path).exists()
    for name in re.findall("`(.+?)`", names or ""):
        body = ast.parse((REPO / path).read_text("utf-8")).body
        for part in name.split("."):
            body = next(node.body for node in body if getattr(node, "name", None) == part)


@pytest.mark.parametrize("page, name", found(lambda text: re.findall(r"`(test_\w+)`", text)))
def test_every_test_that_is_named_exists(page, name):
    assert any(f"def {name}(" in path.read_text("utf-8") for path in REPO.glob("tests/*/test_*.py"))


def test_the_worked_diff_applies_and_its_test_passes(monkeypatch):
    page = (REPO / "docs/contributing.md").read_text("utf-8")
    [diff] = [code for kind, code in FENCE.findall(page) if kind == "diff"]
    changed: dict[str, str] = {}
    for part in re.split("^--- ", diff, flags=re.MULTILINE)[1:]:
        title, *lines = part.splitlines()
        path = title.split(",")[0]
        text = changed.get(path) or (REPO / path).read_text("utf-8")
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert before == "" or text.count(before) == 1
        changed[path] = text.replace(before, after) if before else f"{text}\n\n{after}"
    monkeypatch.delitem(sys.modules, "helpers")  # it will import the changed model
    for path, text in changed.items():
        module = types.ModuleType(Path(path).stem)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(text, path, "exec"), vars(module))
    getattr(module, re.search(r"test_\w+", after)[0])()


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text("utf-8").split()) <= 1600

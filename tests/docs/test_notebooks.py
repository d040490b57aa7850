"""The notebooks of docs/: what is stored in them, and runs of their cells from top to bottom.

After a change of a notebook, `PYTHONPATH=.:tests python tests/docs/test_notebooks.py` runs both in
the checkout and stores their outputs; `... test_notebooks.py attention` only that one.
"""

from __future__ import annotations

import base64
import copy
import io
import random
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import test_docs
from helpers import REPO
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import validator
from PIL import Image

MAX_BYTES = {"attention": 250_000, "quickstart": 300_000}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE_PATH = re.compile(r"(?<![\w./])/\w[\w.-]*/|\b[A-Z]:\\|~/|file://")
NAMES = pytest.mark.parametrize("name", [*MAX_BYTES])


def path_of(name: str) -> Path:
    return REPO / f"docs/{name}.ipynb"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(path_of(name), as_version=4)


# ---- running and storing -----------------------------------------------------------------------


def execute(notebook, folder: Path) -> None:
    """All cells, in a kernel that starts in the folder; raises CellExecutionError."""
    options = {"kernel_name": "python3", "timeout": 600, "coalesce_streams": True}
    options["resources"] = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, **options).execute()


def tidy(notebook) -> None:
    """Leave out what belongs to a machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})


def compress(notebook) -> None:
    """128 colours are enough for these pictures, and take a third of the bytes."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            file = io.BytesIO()
            picture.convert("RGB").quantize(128).save(file, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def store(names: list[str]) -> None:
    for name in names or MAX_BYTES:
        notebook = read(name)
        execute(notebook, REPO / "docs")
        tidy(notebook)
        compress(notebook)
        nbformat.write(notebook, path_of(name))
        print(f"{name}: {path_of(name).stat().st_size:,} bytes", *faults_of(notebook))


# ---- what is stored ----------------------------------------------------------------------------


def faults_of(notebook) -> list[str]:
    """What is wrong with a notebook as it is stored."""
    faults = [f"not valid: {error.message}" for error in validator.iter_validate(notebook)]
    if len({cell.id for cell in notebook.cells}) < len(notebook.cells):
        faults.append("an id twice")
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        faults.append("not of format 4.5")
    tidied = copy.deepcopy(notebook)
    tidy(tidied)
    if tidied != notebook:
        faults.append("not tidy")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        faults.append("not run once from top to bottom")
    outputs = [output for cell in cells for output in cell.outputs]
    if any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs):
        faults.append("an error or a warning")
    texts = [cell.source for cell in notebook.cells] + [o.get("text", "") for o in outputs]
    for data in (output.get("data", {}) for output in outputs):
        texts += [text for kind, text in data.items() if not kind.startswith("image/")]
    return faults + [f"a path: {text}" for text in texts if ABSOLUTE_PATH.search(text)]


@NAMES
def test_it_is_stored_with_its_outputs_and_nothing_of_a_machine(name):
    assert faults_of(read(name)) == []
    assert path_of(name).stat().st_size <= MAX_BYTES[name]


def same_id(cells):
    cells[1].id = cells[0].id


def out_of_order(cells):
    cells[0].execution_count = 7


def timed(cells):
    cells[0].metadata["execution"] = {"iopub.execute_input": "2020-01-01T00:00:00Z"}


def printed(text: str, stream: str = "stdout"):
    def change(cells):
        cells[0].outputs = [nbformat.v4.new_output("stream", name=stream, text=text)]

    return change


@pytest.mark.parametrize(
    "change",
    [
        same_id,
        out_of_order,
        timed,
        printed("warning", "stderr"),
        printed("wrote /home/me/a.png"),
    ],
)
def test_a_fault_is_found(change):
    notebook = read("attention")
    change([cell for cell in notebook.cells if cell.cell_type == "code"])
    assert len(faults_of(notebook)) == 1


@NAMES
def test_what_its_text_names_is_there(name, monkeypatch):
    """Links, sources and commands, as in the pages."""
    monkeypatch.chdir(REPO)
    cells = read(name).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in test_docs.links_of(text):
        test_docs.test_every_link_leads_somewhere(path_of(name), link)
    for source in test_docs.SOURCE.finditer(text):
        test_docs.test_every_source_that_is_named_has_what_is_said_to_be_in_it(None, source[0])
    for command in test_docs.commands_of(text):
        test_docs.check(command)


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy without data but for a text, which is generated where Tiny Shakespeare isn't here."""
    for name in ("model.py", "train.py", "sample.py", "prepare.py"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("config", "docs", "lecture", "quill"):
        shutil.copytree(REPO / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    text = tmp_path / "data/tinyshakespeare.txt"
    shakespeare = REPO.parent / "shared/data/tinyshakespeare.txt"
    if shakespeare.exists():
        shutil.copy(shakespeare, text)
    else:
        rng = random.Random(0)
        words = "ROMEO: Not in my house, Lucentio; for you know what light breaks through".split()
        words += ["".join(rng.choices("aenrst", k=rng.randint(2, 7))) for _ in range(200)]
        text.write_text("".join(rng.choice(words) + rng.choice("   \n") for _ in range(50_000)))
    for variable in ("PYTHONPATH", "MPLBACKEND"):  # a learner has set neither
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path


def run(name: str, folder: Path, changes: dict[str, str]) -> list[str]:
    """-> what the cells printed, after these changes of their source."""
    notebook = read(name)
    for old, new in changes.items():
        [cell] = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    execute(notebook, folder)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" for output in outputs)
    return [output.get("text", "") for output in outputs]


SHORT = {
    "max_iters = 2000": "max_iters = 100",
    'run("python prepare.py")': 'run("python prepare.py --input=data/tinyshakespeare.txt")',
}


@pytest.mark.slow
def test_attention_runs(checkout):
    run("attention", checkout / "docs", {})


@pytest.mark.slow
def test_quickstart_runs(checkout):
    out = "".join(run("quickstart", checkout, SHORT))
    assert "ROMEO:" in out and "val bpb" in out and "wrote out-quickstart/neighbours.png" in out


def test_a_command_that_fails_stops_the_notebook(checkout):
    with pytest.raises(CellExecutionError, match="CalledProcessError"):
        run("quickstart", checkout, {'run("python prepare.py")': 'run("python prepare.py --no=1")'})


if __name__ == "__main__":
    store(sys.argv[1:])

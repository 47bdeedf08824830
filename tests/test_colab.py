"""The first cell of the lessons, in an empty folder where `google.colab` is loaded; and what it does elsewhere."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import colab
import colab_cells
import lessons
import pytest
from packaging.utils import canonicalize_name

ROOT = colab.ROOT
GITHUB = f"https://github.com/{colab_cells.REPOSITORY}"
CELL = colab_cells.CELL.format(repository=colab_cells.REPOSITORY)

# Runs the cell twice, as Colab would, but for pip: `started` has what it starts. One package is too old.
DRIVER = """
import importlib.metadata as metadata, json, os, subprocess, sys, types

sys.modules["google"] = sys.modules["google.colab"] = types.ModuleType("google.colab")
real_run, real_version, started = subprocess.run, metadata.version, []

def run(command, **options):
    started.append(command)
    if "pip" in command:
        return subprocess.CompletedProcess(command, 0)
    return real_run(command, **options)

subprocess.run = run
metadata.version = lambda name: "0.1" if name == "ftfy" else real_version(name)
cell = compile(sys.argv[1], "cell", "exec")
exec(cell, {})
loaded = [name for name in ("torch", "numpy", "diffusers") if name in sys.modules]
exec(cell, {})
import helpers
where = "import importlib.util; print(importlib.util.find_spec('helpers').origin)"
child = real_run([sys.executable, "-c", where], capture_output=True, text=True)
print(json.dumps([os.getcwd(), helpers.__file__, child.stdout.strip(), started, loaded]))
"""


def run_cell(folder):
    """What DRIVER tells, the clone coming from this repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", DRIVER, CELL.replace(GITHUB, ROOT.as_uri())]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, result = done.stdout.splitlines()
    assert said == "Installing what the lessons need: a few minutes, once."
    return json.loads(result)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a folder that is no clone cannot be cloned")
def test_the_cell_in_an_empty_folder(tmp_path):
    where, helpers, child, started, loaded = run_cell(tmp_path)
    assert Path(where) == tmp_path / "lessons" / "notebooks"
    assert Path(helpers) == Path(child) == tmp_path / "lessons" / "helpers" / "__init__.py"
    clone, pip = started
    assert clone == ["git", "clone", "--depth=1", ROOT.as_uri(), "lessons"]
    assert pip[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert pip[5:][: len(colab.needed())] == [str(one) for one in colab.needed()]
    assert loaded == []  # what pip replaces is not imported before
    # A session that was restarted begins in the folder above, where the clone is.
    where, *_, started, _ = run_cell(tmp_path)
    assert Path(where) == tmp_path / "lessons" / "notebooks" and [pip] == started


def test_elsewhere_the_cell_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(subprocess, "run", None)
    before = list(sys.path)
    exec(CELL, {})
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir()) and sys.path == before


def test_colab_keeps_its_kernel_and_its_torch():
    names = {one.name for one in colab.needed()}
    assert {"torch", "diffusers", "bitsandbytes", "packaging"} <= names
    assert not {name for name in names if name.startswith(("jupyter", "ipy", "sphinx", "pytest"))}
    assert all("==" not in str(one) for one in colab.needed())


def test_what_the_lessons_import_is_installed():
    """All but the form's library, of which Colab has its own."""
    programs = [path.read_text(encoding="utf-8") for path in ROOT.glob("[hp]*s/*.py")]
    for path in ROOT.glob("notebooks/*.ipynb"):
        programs += [cell["source"] for cell in lessons.read(path.stem) if cell["cell_type"] == "code"]
    found = set()
    for node in (node for program in programs for node in ast.walk(ast.parse(program))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    packages = {canonicalize_name(name) for module in found for name in packages_distributions().get(module, ())}
    assert "torch" in packages and packages & colab.LEFT_OUT == {"ipywidgets"}


@pytest.fixture
def missing(monkeypatch):
    """One package is missing, and pip is not called: the list has what would be."""
    started = []
    monkeypatch.setattr(colab, "installed", lambda name: None if name == "ftfy" else "99")
    monkeypatch.setattr(colab.subprocess, "run", lambda command, **_: started.append(command) or SimpleNamespace(**END))
    return started


END = {"returncode": 1, "stderr": "WARNING: a\nERROR: No matching distribution found for ftfy\nWARNING: b\n"}


def test_pip_that_fails_is_quoted(missing, monkeypatch):
    monkeypatch.setattr(colab, "print", lambda *_, **__: None, raising=False)
    with pytest.raises(colab.SetUpError, match="says: ERROR: No matching distribution found for ftfy[.]$") as caught:
        colab.set_up()
    assert caught.value._render_traceback_() == [str(caught.value)]
    assert len(missing) == 1 and set(colab.WITH_TORCH) <= set(missing[0])


def test_what_was_imported_before_asks_for_a_restart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", SimpleNamespace(__version__="11.0"))
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    with pytest.raises(colab.SetUpError, match="older versions of pillow before: choose Runtime, Restart session"):
        colab.set_up()
    assert Path.cwd() == tmp_path


def test_a_publisher_sets_the_address_once():
    notebook = colab_cells.nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    for repository in ("someone/lessons", "another/lessons"):
        colab_cells.write_cell(notebook, "00_start_here.ipynb", repository)
        title, cell, after = notebook.cells[:3]
        link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/00_start_here.ipynb"
        assert title.source.endswith(f"\n\n[Open in Colab]({link})") and title.source.count("Colab") == 1
        assert f'"https://github.com/{repository}"' in cell.source and after.id != "colab"
    colab_cells.write_cell(notebook, "00_start_here.ipynb", colab_cells.PLACEHOLDER)
    assert "Colab" not in notebook.cells[0].source and colab_cells.PLACEHOLDER in notebook.cells[1].source

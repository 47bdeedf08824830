"""Every committed notebook passes every static check."""

import copy
import re

import nbformat
import pytest
from colab_cells import REPOSITORY, write_cell
from notebook_checks import (
    CHECKS,
    DIGESTS,
    NOTEBOOKS,
    ROOT,
    broken_links,
    digests,
    file_anchors,
    skipped_levels,
    without_code,
)

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
READMES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("checkpoints/*/README.md"))]


def test_there_are_notebooks():
    assert PATHS, "No notebooks in notebooks/: there is nothing to check."


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook(path, check):
    problems = check(nbformat.read(path, as_version=4))
    assert not problems, "\n".join([path.name, *problems])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_notebook_begins_with_the_cell_for_colab(path):
    notebook = nbformat.read(path, as_version=4)
    written = copy.deepcopy(notebook)
    write_cell(written, path.name, REPOSITORY)
    assert written == notebook, "Call `python tools/colab_cells.py && python tests/notebook_checks.py`."
    assert notebook.cells[1].outputs == []


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_the_readmes_lead_somewhere(path):
    assert broken_links(path.read_text(), path.parent, file_anchors(path)) == []


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_readmes_have_headings_in_order_and_pictures_described(path):
    text = path.read_text(encoding="utf-8")
    assert skipped_levels(text) == [] and len(re.findall(r"^# ", without_code(text), re.MULTILINE)) == 1
    for described in re.findall(r"!\[([^]]*)\]", text):
        assert re.fullmatch(r".{20,}[.。]", described), f"no sentence: {described!r}"


def test_stored_outputs_are_those_of_the_last_run():
    old, new = DIGESTS.read_text().splitlines(), digests().splitlines()
    assert old == new, (
        f"Code cells or stored outputs changed in {sorted({line.split()[1] for line in set(old) ^ set(new)})}. "
        "If a run stored them: `python tests/notebook_checks.py`."
    )

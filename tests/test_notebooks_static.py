"""Every committed notebook passes every static check."""

import nbformat
import pytest
from notebook_checks import CHECKS, NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_there_are_notebooks():
    assert PATHS, "No notebooks in notebooks/: there is nothing to check."


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook(path, check):
    problems = check(nbformat.read(path, as_version=4))
    assert not problems, "\n".join([path.name, *problems])

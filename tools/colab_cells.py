"""Write the first code cell of each lesson, which sets it up on Google Colab, and the link that opens it there.

    python tools/colab_cells.py && python tests/notebook_checks.py    # which renews the digests of what is stored

Whoever publishes the lessons sets REPOSITORY and calls this once. Without it there is no link, and the cell has a
placeholder. Called again, it changes nothing.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "OWNER/REPOSITORY"
REPOSITORY = PLACEHOLDER  # on GitHub
CELL = """# On Colab, this fetches the lessons and installs what they need. Elsewhere it does nothing.
import os
import sys

if "google.colab" in sys.modules and not os.path.exists("../helpers"):
    import runpy
    import subprocess

    if not os.path.exists("lessons"):
        subprocess.run(["git", "clone", "--depth=1", "https://github.com/{repository}", "lessons"], check=True)
    runpy.run_path("lessons/tools/colab.py", run_name="__main__")
"""
LINK = re.compile(r"\n\n\[Open in Colab\]\(\S*\)$")


def write_cell(notebook: nbformat.NotebookNode, name: str, repository: str) -> None:
    """Put link and cell into a notebook, in place of older ones. All outputs stay; numbers of cells follow."""
    title = notebook.cells[0]
    title.source = LINK.sub("", title.source)
    if repository != PLACEHOLDER:
        address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"
        title.source += f"\n\n[Open in Colab]({address})"
    cell = nbformat.v4.new_code_cell(CELL.format(repository=repository).strip(), id="colab")
    cell.metadata["jupyter"] = {"source_hidden": True}
    notebook.cells = [title, cell, *(other for other in notebook.cells[1:] if other.id != "colab")]
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def main() -> None:
    """Write them into all notebooks."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        write_cell(notebook, path.name, REPOSITORY)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The notebook runner, on tiny notebooks: exit status, its lines, the pages."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

# The smallest picture: one transparent pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def write_notebook(folder, name, *sources):
    """A notebook with a title, a link to the next one, and these code cells, which store an old output."""
    cells = [new_markdown_cell("# Title\n\n[next](02_next.ipynb)"), *map(new_code_cell, sources)]
    for cell in cells[1:]:
        cell.outputs = [nbformat.v4.new_output("stream", text="old output\n")]
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, run_notebooks.__file__, "--notebooks", folder, "--build", folder / "build"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_passing_and_failing(tmp_path):
    """One run of four notebooks: each has its line and its page, and the failing ones stop nobody."""
    picture = f"from IPython.display import Image\nimport base64\nImage(base64.b64decode('{PIXEL}'))"
    where = "import os\nprint(os.path.basename(os.getcwd()), os.environ['TUTORIAL_MODELS'])"
    paths = [
        write_notebook(tmp_path, "01_good", where, picture),
        write_notebook(tmp_path, "02_bad", "x = 1", "\nresult = 1 / 0\nresult", "print('never')"),
        write_notebook(tmp_path, "03_dies", "import os\nos._exit(1)"),
        tmp_path / "04_broken.ipynb",
    ]
    paths[3].write_text("not a notebook")
    before = [path.read_bytes() for path in paths]

    process = start(tmp_path, TUTORIAL_MODELS="random")
    output, errors = process.communicate(timeout=60)

    lines = output.splitlines()
    assert process.returncode == 1
    assert errors == ""
    assert lines[0].startswith("01_good  passed")
    assert lines[1].startswith("02_bad  FAILED")
    assert lines[1].endswith("cell 2 (result = 1 / 0): ZeroDivisionError: division by zero")
    assert lines[2].startswith("03_dies  FAILED") and "cell 1 (import os): the kernel died" in lines[2]
    assert lines[3].startswith("04_broken  FAILED") and "not a valid notebook" in lines[3]
    assert lines[4].startswith("3 of 4 notebooks failed") and str(tmp_path / "build") in lines[4]

    good, bad = ((tmp_path / "build" / f"{name}.html").read_text() for name in ("01_good", "02_bad"))
    assert f"{tmp_path.name} random" in good
    assert f"data:image/png;base64,{PIXEL}" in good
    assert 'href="02_next.html"' in good
    assert "ZeroDivisionError" in bad
    assert "old output" not in good + bad
    assert [path.read_bytes() for path in paths] == before


def test_no_notebooks(tmp_path, capsys):
    assert run_notebooks.main(["--notebooks", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"No notebooks in {tmp_path}: nothing to run.\n"


def test_stop(tmp_path):
    """Ctrl-C, or a kill, ends runner and kernel with one word."""
    runs = []
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        write_notebook(folder, "01_long", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)")
        runs.append((number, folder / "pid", start(folder)))
    for number, pid_file, process in runs:
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert errors.strip() == "Stopped."
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)

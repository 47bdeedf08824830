"""The notebook runner, on tiny notebooks: exit status, its lines, what it writes."""

import base64
import errno
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pages
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.errors import TutorialError

# The smallest picture: one transparent pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


LONG = "The checkpoint is not there, " + "for a reason of many words, " * 40 + "so do what stands here at the end."


def write_notebook(folder, name, *sources):
    """A notebook with a title, a link to the next one, and these code cells, which store an old output."""
    cells = [
        new_markdown_cell("# Title\n\n[next](02_bad.ipynb) and [none](02_none.ipynb)"),
        *map(new_code_cell, sources),
    ]
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
    """One run of five notebooks: each has its line and its page, and the failing ones stop nobody."""
    picture = f"from IPython.display import Image\nimport base64\nImage(base64.b64decode('{PIXEL}'))"
    where = "import os\nprint(os.path.basename(os.getcwd()), os.environ['TUTORIAL_MODELS'])"
    paths = [
        write_notebook(tmp_path, "01_good", where, picture),
        write_notebook(tmp_path, "02_bad", "x = 1", "\nresult = 1 / 0\nresult", "print('never')"),
        write_notebook(tmp_path, "03_dies", "import os\nos.kill(os.getpid(), 9)"),
        tmp_path / "04_broken.ipynb",
        write_notebook(
            tmp_path, "05_advice", f"class TutorialError(RuntimeError): pass\nraise TutorialError({LONG!r})"
        ),
    ]
    paths[3].write_text("not a notebook")
    before = [path.read_bytes() for path in paths]

    process = start(tmp_path, TUTORIAL_MODELS="random")
    output, errors = process.communicate(timeout=60)

    stored = [path for path in paths if path != paths[3]]
    lines = output.splitlines()
    assert process.returncode == 1
    # A kernel that is ending may write this one line: libzmq, when its socket is closed while it is asked.
    ending = r"Assertion failed: pfd\.revents & POLLIN \(src/signaler\.cpp:\d+\)"
    assert [line for line in errors.splitlines() if not re.fullmatch(ending, line)] == []
    assert lines[0].startswith("01_good  passed")
    assert lines[1].startswith("02_bad  FAILED")
    assert lines[1].endswith("cell 2 (result = 1 / 0): ZeroDivisionError: division by zero")
    assert lines[2].startswith("03_dies  FAILED") and lines[2].endswith(
        "cell 1 (import os): the kernel was killed (SIGKILL), most often because host memory ran out"
    )
    assert lines[3].startswith("04_broken  FAILED") and "not a valid notebook" in lines[3]
    assert lines[4].startswith("05_advice  FAILED") and lines[4].endswith(f"TutorialError: {LONG}")
    assert lines[5].startswith("4 of 5 notebooks failed") and str(tmp_path / "build") in lines[5]

    build = tmp_path / "build"
    assert sorted(path.name for path in (build / "notebooks").iterdir()) == [f"{path.stem}.ipynb" for path in stored]
    good, bad = ((build / f"{path.stem}.html").read_text() for path in stored[:2])
    assert f"{tmp_path.name} random" in good
    assert [path.read_bytes() for path in (build / "_images").iterdir()] == [base64.b64decode(PIXEL)]
    assert 'href="02_bad.html"' in good
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


def test_build_folder_that_cannot_be_written(tmp_path, capsys):
    """Said before the first cell runs."""
    write_notebook(tmp_path, "01_good", "open('ran', 'w')")
    (tmp_path / "build").touch()
    assert run_notebooks.main(["--notebooks", str(tmp_path), "--build", str(tmp_path / "build")]) == 1
    printed = capsys.readouterr()
    assert "build cannot be written (a file stands where a folder must be): name another" in printed.err
    assert printed.err.count("\n") == 1 and not (tmp_path / "ran").exists()


def test_notebook_that_cannot_be_written_leaves_the_figures(tmp_path, capsys, monkeypatch):
    path = write_notebook(tmp_path, "01_good", "print('latency', 1.5)", "2.5")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    assert run_notebooks.run_one(path, tmp_path)[0] is False
    printed = capsys.readouterr().out
    assert "latency 1.5" in printed and "2.5" in printed
    assert printed.splitlines()[-1].startswith("01_good  FAILED")
    assert "the lesson passed; " in printed and "01_good.ipynb cannot be written (the disk is full): free" in printed


def test_pages_that_cannot_be_written_leave_the_figures(tmp_path, capsys, monkeypatch):
    write_notebook(tmp_path, "01_good", "print('latency', 1.5)", "2.5")

    def refuse(*arguments):
        raise TutorialError("The disk is full.")

    monkeypatch.setattr(pages, "build", refuse)
    assert run_notebooks.main(["--notebooks", str(tmp_path), "--build", str(tmp_path / "build")]) == 1
    printed = capsys.readouterr()
    assert printed.err == "The disk is full.\n"
    first, *figures, last = printed.out.splitlines()
    assert first.startswith("01_good  passed") and "latency 1.5" in figures and "2.5" in figures
    assert last == f"1 of 1 notebooks passed. No pages; the notebooks are in {tmp_path}/build/notebooks."

"""The notebook runner, on tiny notebooks: exit status, its lines, the pages."""

import errno
import os
import re
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


LONG = "The checkpoint is not there, " + "for a reason of many words, " * 40 + "so do what stands here at the end."


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

    lines = output.splitlines()
    assert process.returncode == 1
    assert errors == ""
    assert lines[0].startswith("01_good  passed")
    assert lines[1].startswith("02_bad  FAILED")
    assert lines[1].endswith("cell 2 (result = 1 / 0): ZeroDivisionError: division by zero")
    assert lines[2].startswith("03_dies  FAILED") and lines[2].endswith(
        "cell 1 (import os): the kernel was killed (SIGKILL), most often because host memory ran out"
    )
    assert lines[3].startswith("04_broken  FAILED") and "not a valid notebook" in lines[3]
    assert lines[4].startswith("05_advice  FAILED") and lines[4].endswith(f"TutorialError: {LONG}")
    assert lines[5].startswith("4 of 5 notebooks failed") and str(tmp_path / "build") in lines[5]

    good, bad = ((tmp_path / "build" / f"{name}.html").read_text() for name in ("01_good", "02_bad"))
    assert f"{tmp_path.name} random" in good
    assert f"data:image/png;base64,{PIXEL}" in good
    assert 'href="02_next.html"' in good
    assert "ZeroDivisionError" in bad
    assert "old output" not in good + bad
    assert [path.read_bytes() for path in paths] == before


def test_pages_leave_checks_out_and_describe_pictures(tmp_path):
    """The message of a picture stands after it, or where its section ends with it, before it."""
    picture = nbformat.v4.new_output("display_data", data={"image/png": PIXEL})
    check = new_code_cell("assert not 'for authors'[99:]", metadata={"tags": ["check"]})
    cells = [
        new_markdown_cell("## A\n\nLook at the **first** [one](a.md). It is small."),
        new_code_cell("first", outputs=[picture]),
        check,
        new_markdown_cell("## B"),
        new_code_cell("second", outputs=[picture]),
        new_markdown_cell('The "second" one\nis small, too: look.'),
    ]
    run_notebooks.write_html(run_notebooks.Run(tmp_path / "a.ipynb", new_notebook(cells=cells)), tmp_path)
    page = (tmp_path / "a.html").read_text()
    assert re.findall(r'alt="([^"]*)"', page) == [
        "Look at the first one.",
        "The &quot;second&quot; one is small, too: look.",
    ]
    assert "first" in page and "for authors" not in page


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


def test_page_that_cannot_be_written_leaves_the_figures(tmp_path, capsys, monkeypatch):
    path = write_notebook(tmp_path, "01_good", "print('latency', 1.5)", "2.5")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    assert run_notebooks.run_one(path, tmp_path) is False
    printed = capsys.readouterr().out
    assert "latency 1.5" in printed and "2.5" in printed
    assert printed.splitlines()[-1].startswith("01_good  FAILED")
    assert "the lesson passed; " in printed and "01_good.html cannot be written (the disk is full): free" in printed

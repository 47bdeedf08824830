"""`make test` names a kernel that ended at once. The options of pytest are those of the Makefile."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent


ENDS = {
    "os.kill(os.getpid(), 9)": "the kernel was killed (SIGKILL), most often because host memory ran out",
    "os.kill(os.getpid(), 11)": "the kernel was stopped by SIGSEGV",
    "os._exit(3)": "the kernel ended by itself (exit status 3)",
    "import time; time.sleep(3)": None,
}


def test_a_kernel_that_ends_is_named_at_once(tmp_path):
    for number, last in enumerate(ENDS):
        cells = [new_code_cell(source) for source in ("import os", last, "pass", "pass")]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{number}.ipynb")
    (options,) = re.findall(r"(?s)pytest \$\$color (.*?) notebooks\n", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "pytest", "--color=no", *options.replace("\\\n", " ").split(), str(tmp_path)]
    # Well below the time limit of a cell, 180 s.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    for last, sentence in ENDS.items():
        assert sentence is None or f"Cell 1: {sentence}\n\nInput:\n{last}\n" in done.stdout
    assert "3 failed, 7 passed, 6 skipped" in done.stdout, done.stdout + done.stderr

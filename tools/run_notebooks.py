"""Execute every notebook headless and build the web pages from what that gave, as `make site` does from what is stored.

    python tools/run_notebooks.py [--notebooks notebooks] [--build build]

The notebooks themselves stay as they are: each is written with its new outputs into the folder of the pages, as soon as
it ends. They see this program's environment, TUTORIAL_MODELS included.
Exit status: 0 if all passed, 1 if any failed or none was found, 130 after Ctrl-C.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    import nbformat
    import pages
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from traitlets.config import Config

    from helpers import errors, files
except ImportError as error:
    sys.exit(f"{error.name} is missing: start this with `make run`, which sets up .venv.")

ROOT = Path(__file__).resolve().parent.parent
OTHER_BUILD = "name another folder, as in make run ARGS='--build /tmp/pages'"
EXECUTED = "notebooks"  # where the executed notebooks lie in the folder of the pages
LOG_EVERY_S = 20  # a sign of life when nobody watches a terminal


@dataclass
class Run:
    """One notebook on its way."""

    path: Path
    notebook: nbformat.NotebookNode
    started: float = field(default_factory=time.monotonic)
    cell_number: int = 0  # of code cells, from 1, as the reader sees them: In [7]
    cell_source: str = ""
    kernel: subprocess.Popen | None = None

    @property
    def cell_count(self) -> int:
        """How many code cells will run."""
        return sum(is_executed(cell) for cell in self.notebook.cells)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def on_cell(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """nbclient calls this before each code cell."""
        self.cell_number += 1
        self.cell_source = cell.source


def kernel_process(client: NotebookClient) -> subprocess.Popen | None:
    """The process of the kernel; None before it starts and after it is cleaned up."""
    return getattr(getattr(client.km, "provisioner", None), "process", None)


def is_executed(cell: nbformat.NotebookNode) -> bool:
    """Whether nbclient sends this cell to the kernel: code, and not empty."""
    return cell.cell_type == "code" and bool(cell.source.strip())


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook without its stored outputs, so that no old output passes for one of this run.

    Raises ValueError if the file is no valid notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError) as error:
        raise ValueError(f"not a valid notebook: {first_line(str(error))}") from error
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def execute(run: Run) -> str | None:
    """Execute the notebook in place, in its own folder. None, or one sentence on what failed."""
    client = NotebookClient(
        run.notebook,
        timeout=None,  # a full-size run may take an hour
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(run.path.parent)}},
        config=Config(KernelManager={"transport_encryption": "auto"}),  # else every kernel warns that it is off
    )

    def on_cell(cell: nbformat.NotebookNode, cell_index: int) -> None:
        run.on_cell(cell, cell_index)
        run.kernel = kernel_process(client)

    client.on_cell_execute = on_cell
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            asyncio.run(client.async_execute())
            outcome.append(None)
        except BaseException as error:  # reported by the main thread
            outcome.append(error)

    # The kernel is driven from a thread: this one shows the time passing, and Ctrl-C reaches it.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        show_progress(run, worker)
    except KeyboardInterrupt:
        kill_kernel(client)
        worker.join(timeout=10)
        raise
    return describe_failure(run, outcome[0])


def show_progress(run: Run, worker: threading.Thread) -> None:
    """Until the worker ends: a line that is rewritten on a terminal, else one now and then."""
    terminal = sys.stdout.isatty()
    next_log = LOG_EVERY_S
    while worker.is_alive():
        worker.join(timeout=0.2)
        line = f"[{run.path.stem}] cell {run.cell_number}/{run.cell_count}  {run.seconds:.0f} s"
        if terminal:
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif run.seconds > next_log:
            print(line, flush=True)
            next_log += LOG_EVERY_S
    if terminal:
        print("\r\x1b[K", end="", flush=True)


def kill_kernel(client: NotebookClient) -> None:
    """End the kernel at once; it has its own process group and has seen no Ctrl-C."""
    process = kernel_process(client)
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe_failure(run: Run, error: BaseException | None) -> str | None:
    """One sentence that names the cell and the error; None if there was none."""
    if error is None:
        return None
    where = f"cell {run.cell_number} ({textwrap.shorten(first_line(run.cell_source), 100, placeholder='...')})"
    if isinstance(error, CellExecutionError):
        return f"{where}: {error.ename}: {first_line(error.evalue) or 'no message'}"
    where = where if run.cell_number else "before the first cell"
    if isinstance(error, DeadKernelError):
        return f"{where}: the kernel {errors.describe_end(run.kernel.poll() if run.kernel else None)}"
    if isinstance(error, OSError) and error.filename:
        return f"{where}: {files.cannot_write(error.filename, error, 'make room for it there')}"
    return f"{where}: {type(error).__name__}: {first_line(str(error))}"


def first_line(text: str) -> str:
    """The first line that is not blank; none is cut, because the remedy stands at the end."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def print_outputs(run: Run) -> None:
    """Print the texts that the cells gave: what was measured, where it cannot be written."""
    for cell in run.notebook.cells:
        for output in cell.get("outputs", ()):
            print(output.get("text") or output.get("data", {}).get("text/plain", ""))


def run_one(path: Path, build: Path) -> tuple[bool, Run | None]:
    """Execute one notebook, write it, print its line. Whether it passed, and the run, unless it is no notebook."""
    try:
        run = Run(path, read_notebook(path))
    except (ValueError, OSError) as error:
        print(f"{path.stem}  FAILED  {first_line(str(error))}", flush=True)
        return False, None
    failure = execute(run)
    seconds = run.seconds
    try:
        files.check_writable(build / EXECUTED, OTHER_BUILD)
        files.write_text(build / EXECUTED / path.name, nbformat.writes(run.notebook) + "\n", OTHER_BUILD)
    except errors.TutorialError as error:
        print_outputs(run)
        failure = f"{failure or 'the lesson passed'}; {error}"
    if failure:
        print(f"{path.stem}  FAILED  {seconds:.1f} s  {failure}", flush=True)
        return False, run
    print(f"{path.stem}  passed  {seconds:.1f} s", flush=True)
    return True, run


def build_pages(runs: list[Run], build: Path) -> bool:
    """Build the web pages of all runs. True if that worked; if not, says why and prints what was measured."""
    folder = runs[0].path.resolve().parent
    notebooks = {Path(folder.name) / run.path.name: run.notebook for run in runs}
    try:
        # What is wrong with a link is for `make site` to say.
        pages.build(folder.parent, notebooks, build.resolve(), OTHER_BUILD)
    except errors.TutorialError as error:
        for run in runs:
            print_outputs(run)
        print(error, file=sys.stderr)
        return False
    return True


def stop(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: no kernel stays behind."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run all notebooks in the order of their names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="folder of the notebooks")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder for the pages")
    options = parser.parse_args(arguments)
    paths = sorted(options.notebooks.glob("*.ipynb"))
    if not paths:
        print(f"No notebooks in {options.notebooks}: nothing to run.", file=sys.stderr)
        return 1
    try:
        files.check_writable(options.build, OTHER_BUILD)
    except errors.TutorialError as error:
        print(error, file=sys.stderr)
        return 1
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the kernel's debugger warns at every start
    signal.signal(signal.SIGTERM, stop)
    try:
        outcomes = [run_one(path, options.build) for path in paths]
        runs = [run for _, run in outcomes if run]
        has_pages = bool(runs) and build_pages(runs, options.build)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr, flush=True)
        # Not by a return: nbclient cleans up at exit what its own thread, above, may still be cleaning up.
        os._exit(130)
    failed = sum(not passed for passed, _ in outcomes)
    verdict = (
        f"{failed} of {len(paths)} notebooks failed" if failed else f"{len(paths)} of {len(paths)} notebooks passed"
    )
    build = options.build.resolve()
    where = (
        f"Open {build}/index.html in a browser" if has_pages else f"No pages; the notebooks are in {build / EXECUTED}"
    )
    print(f"{verdict}. {where}.")
    return 0 if has_pages and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

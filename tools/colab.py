"""Set the lessons up on Google Colab: what their first cell runs there, once it has cloned this repository.

It imports nothing of `helpers`, which imports torch and numpy: pip may have to replace those.
"""

import importlib
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Colab has its own kernel and front end, which the lessons' would break. Pages and tests are made elsewhere.
LEFT_OUT = {
    *("ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbformat"),
    *("furo", "myst-nb", "sphinx", "sphinx-copybutton"),
    *("nbval", "pytest", "pytest-xdist", "pyyaml", "ruff"),
}
# Each fits one torch alone. Colab has them: named to pip, they change with torch where torch must change.
WITH_TORCH = ("torchvision", "torchaudio")
MODULES = {"pillow": "PIL"}  # where package and module differ in more than a hyphen


class SetUpError(RuntimeError):
    """One sentence, which the notebook shows alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]  # IPython calls this method in place of printing the traceback


def needed() -> list[Requirement]:
    """What the lessons import, in the ranges of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [one for one in map(Requirement, project["dependencies"]) if one.name not in LEFT_OUT]


def installed(name: str) -> str | None:
    """The version of a package on disk, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def outdated() -> list[str]:
    """The packages that this kernel has imported in another version than the one on disk."""
    found = []
    for name in (requirement.name for requirement in needed()):
        module = sys.modules.get(MODULES.get(name, name.replace("-", "_")))
        if module is not None and getattr(module, "__version__", None) not in (None, installed(name)):
            found.append(name)
    return found


def set_up() -> None:
    """Install what the lessons need, and make their folder the working directory. pip keeps what is new enough.

    Raises SetUpError if pip fails, or if Colab must restart: it imports numpy and others before the first cell.
    """
    wanted = needed()
    if not all(installed(one.name) and one.specifier.contains(installed(one.name)) for one in wanted):
        print("Installing what the lessons need: a few minutes, once.", flush=True)
        packages = [*map(str, wanted), *filter(installed, WITH_TORCH)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["nothing"]
            raise SetUpError(f"pip could not install what the lessons need, and says: {said[-1].rstrip('.')}.")
        importlib.invalidate_caches()
    if old := outdated():
        raise SetUpError(
            f"Colab had imported older versions of {', '.join(old)} before: choose Runtime, Restart session, then"
            " Runtime, Run all; nothing is installed twice."
        )
    # The programs that a lesson starts find `helpers`, too.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(ROOT / "notebooks")


if __name__ == "__main__":
    set_up()

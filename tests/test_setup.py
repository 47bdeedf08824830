"""tools/setup.sh with a stand-in for Python: when it makes .venv, when it installs, what it says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "tools" / "setup.sh"

# Does what setup.sh asks of Python, without its cost. The environment says how it behaves.
STAND_IN = """#!/bin/sh
case "$*" in
    *"%d.%d"*) echo "${FAKE_VERSION:-3.11}" ;;
    *_base_executable*)
        # The real check, told another version.
        "$REAL_PYTHON" -c "import sys; sys.version_info = tuple(map(int, '${FAKE_VERSION:-3.11}'.split('.'))); $2" \\
            >/dev/null && echo "$FAKE_PYTHON" ;;
    --version) echo "Python $FAKE_VERSION" ;;
    -) [ -z "${FAKE_MISSING:-}" ] || echo "$FAKE_MISSING" ;;
    "-m venv .venv") echo venv >>diary; mkdir -p .venv/bin; cp "$FAKE_PYTHON" .venv/bin/python ;;
    *"install -r"*)
        echo install >>diary; printf '%s' "${FAKE_PIP_LOG:-}" >.venv/pip.log; exit "${FAKE_PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A tree with the script, two small files to install from, and the stand-in."""
    (tmp_path / "tools").mkdir()
    shutil.copy(SETUP, tmp_path / "tools")
    (tmp_path / "requirements.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "stand-in").write_text(STAND_IN)
    (tmp_path / "stand-in").chmod(0o755)
    return tmp_path


def setup(tree, **environment):
    """Run it. Returns (exit status, what it says, what it did)."""
    (tree / "diary").write_text("")
    python = str(tree / "stand-in")
    defaults = {"PYTHON": python, "FAKE_PYTHON": python, "REAL_PYTHON": sys.executable, "CXX": "sh"}
    done = subprocess.run(
        ["sh", tree / "tools" / "setup.sh"],
        env={"PATH": os.environ["PATH"], **defaults, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, (tree / "diary").read_text().split()


def test_second_call_does_nothing(tree):
    assert setup(tree)[::2] == (0, ["venv", "install"])
    assert setup(tree) == (0, "", [])
    assert setup(tree, PYTHON="") == (0, "", [])


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_file_updates(tree, name):
    setup(tree)
    (tree / name).write_text("b==2\n")
    assert setup(tree)[::2] == (0, ["install"])
    assert setup(tree)[2] == []


def test_moved_folder_updates(tree):
    setup(tree)
    moved = tree.rename(tree.with_name("moved"))
    assert setup(moved)[2] == ["install"]
    assert setup(moved)[2] == []


def test_unfinished_set_up_starts_anew(tree):
    status, said, _ = setup(tree, FAKE_PIP_STATUS="1")
    assert status == 1
    leftover = tree / ".venv" / "half-written"
    leftover.touch()
    status, said, did = setup(tree)
    assert (status, did) == (0, ["venv", "install"])
    assert "unfinished" in said
    assert not leftover.exists()
    assert setup(tree)[2] == []


def test_interrupted_update_starts_anew(tree):
    setup(tree)
    (tree / "requirements.txt").write_text("b==2\n")
    setup(tree, FAKE_PIP_STATUS="1")
    (tree / "requirements.txt").write_text("a==1\n")
    assert setup(tree)[2] == ["venv", "install"]


def test_broken_or_foreign_venv_starts_anew(tree):
    setup(tree)
    (tree / ".venv" / "bin" / "python").unlink()
    assert setup(tree)[2] == ["venv", "install"]
    (tree / ".venv" / "set-up-for").unlink()
    assert setup(tree)[2] == ["venv", "install"]


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"FAKE_VERSION": "3.9"}, "need Python 3.11 or newer, and"),
        ({"PYTHON": "no-such-python"}, "no-such-python is missing"),
        ({"FAKE_MISSING": "python3.11-venv"}, "sudo apt install python3.11-venv (torch"),
        ({"FAKE_MISSING": "python3.11-dev", "CXX": "no-such-compiler"}, "sudo apt install python3.11-dev g++ (torch"),
    ],
)
def test_unfit_machine(tree, environment, sentence):
    """One sentence says what to do, and nothing is made."""
    status, said, did = setup(tree, **environment)
    assert (status, did) == (1, [])
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tree / ".venv").exists()


def test_folder_that_cannot_be_written(tree):
    tools = tree / "bin"
    tools.mkdir()
    (tools / "mktemp").write_text("#!/bin/sh\necho 'mktemp: failed: ./.probe: Read-only file system' >&2\nexit 1\n")
    (tools / "mktemp").chmod(0o755)
    status, said, did = setup(tree, PATH=f"{tools}:{os.environ['PATH']}")
    assert (status, did) == (1, []) and said.count("\n") == 1
    assert f"{tree} cannot be written (Read-only file system), and .venv" in said


def test_little_space(tree):
    tools = tree / "bin"
    tools.mkdir()
    for megabytes, status, word in [(1000, 1, "Only 1000 MB are free"), (4000, 0, "Note: 4000 MB")]:
        (tools / "df").write_text(f"#!/bin/sh\necho Available\necho disk 9 9 {megabytes} 9%\n")
        (tools / "df").chmod(0o755)
        found, said, _ = setup(tree, PATH=f"{tools}:{os.environ['PATH']}")
        assert found == status
        assert word in said


@pytest.mark.parametrize(
    "log, sentence",
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        (
            "Failed to establish a new connection: [Errno 111]\nERROR: No matching distribution found for a==1",
            "network",
        ),
        (
            "2026-01-01T00:00:00,000 ERROR: No matching distribution found for a==1",
            "found for a==1: pip's index has no",
        ),
        ("2026-01-01T00:00:00,000   ERROR: something else", "pip failed: "),
    ],
)
def test_pip_fails(tree, log, sentence):
    status, said, _ = setup(tree, FAKE_PIP_STATUS="1", FAKE_PIP_LOG=log)
    assert status == 1
    assert sentence in said.splitlines()[-1]

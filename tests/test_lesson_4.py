"""The exercises of lesson 4: its checks accept the solutions and say what is wrong with other answers."""

import json

import lessons
import pytest

from helpers import records
from helpers.checkpoints import PACKAGE_ROOT


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """The names of the cells that work out a step."""
    sources = lessons.sources("04_fill_the_card").values()
    chosen = [
        s for s in sources if s.startswith(("copies =", "def simulate", "def that_stay", "def step_with", "answer"))
    ]
    assert len(chosen) == 5
    code = "\n".join(chosen).replace("../", f"{PACKAGE_ROOT}/").partition("budgets = ")
    names = {"records": records, "json": json}
    exec(
        "from pathlib import Path\n" + code[0] + "answer_gb = None\n" + code[2].partition("answer_gb = None\n")[2],
        names,
    )
    return names


def test_first_exercise(lesson):
    check = lesson["check"]
    assert check(None) == "Give a number of GB."
    assert check(4.6) == "Right."
    assert check(4.0).startswith("Too little: a step takes 1.16 times")
    assert check(6.0) == "It is enough, but less would do."


def test_second_exercise(lesson):
    simulate, sizes, compute, bus = (lesson[name] for name in ("simulate", "MB", "compute_ms", "bus"))
    assert simulate(sizes, 2 * compute, bus, ahead=1) == pytest.approx(2 * lesson["step_ms"], rel=0.01)
    assert simulate(sizes, compute, bus, ahead=1) > 1.1 * lesson["step_ms"]


def test_a_step_cannot_be_shorter_than_its_compute_or_its_copies(lesson):
    simulate, sizes, compute = (lesson[name] for name in ("simulate", "MB", "compute_ms"))
    for bus in (5, 12.5, 25, 60):
        for room in (200, 400, 1600):
            step = simulate(sizes, compute, bus, room=room)
            assert step >= max(sum(sizes) / bus, compute * len(sizes)) - 1e-6
            assert step <= sum(sizes) / bus + compute * len(sizes)

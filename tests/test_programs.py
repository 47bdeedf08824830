"""benchmarks/programs.py runs the programs that a reader takes home, under limits, and writes down what they take."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import programs
from helpers import devices, measure, processes
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

DEVICE = devices.accelerator()
ASKED = SimpleNamespace(
    model="flux", saved="nf4-flux", original="flux", limit=7.5, steps=2, only=None, no_segments=False
)
CALL = ["--width", "32", "--height", "32"]


def test_command_lines(tmp_path):
    commands = programs.find_commands(ASKED, tmp_path)
    assert tuple(commands) == (*programs.DRAWING, *programs.SAVING)
    for name, (program, *arguments) in commands.items():
        assert Path(program).is_file() and Path(program).name == name.split()[0]
        assert arguments[0] == ("nf4-flux" if name in programs.DRAWING else "flux")
        assert arguments[-len(name.split()[1:]) or len(arguments) :] == name.split()[1:]
    assert commands["draw.py"][2:] == ["a cat in a pool", *"--memory-gb 7.5 --out".split(), *commands["draw.py"][6:]]
    assert commands["draw.py"][-2:] == ["--steps", "2"]
    draws = programs.find_runs(SimpleNamespace(**vars(ASKED) | {"saved": Path("nf4-flux"), "original": None}), tmp_path)
    assert list(draws) == list(programs.DRAWING)
    saves = programs.find_runs(SimpleNamespace(**vars(ASKED) | {"saved": None}), tmp_path)
    assert list(saves) == list(programs.SAVING)


def test_programs_run_in_processes_of_their_own(tiny_checkpoint, tmp_path):
    """Saved by the one, drawn from by the other; on a CPU a limit is a plan, and no card counts memory."""
    asked = SimpleNamespace(**vars(ASKED) | {"saved": tmp_path / "nf4", "original": tiny_checkpoint})
    save = programs.find_runs(asked, tmp_path)["save_nf4.py --device cpu"]()
    draw = programs.find_runs(asked, tmp_path)["draw.py"]
    draw.args[1]["command"] += CALL
    draw = draw()
    assert Image.open(tmp_path / "cat.png").size == (32, 32)
    for row in (save, draw):
        assert row.keys() == {"fits", "allocated_gb", "reserved_gb", "call_s", "host_peak_gb"}
        assert row["fits"] and row["call_s"] > 0 and row["host_peak_gb"] > 0.2
        assert (row["reserved_gb"] is None) == (DEVICE.type == "cpu")
    again = programs.find_runs(asked, tmp_path)["save_nf4.py --device cpu"]
    with pytest.raises(TutorialError, match="is not empty"):
        again()


def test_a_program_that_does_not_fit_is_a_row(tmp_path):
    tmp_path.joinpath("chain.py").write_text(
        "import sys, torch\n"
        "try:\n    try:\n        raise torch.OutOfMemoryError('much')\n"
        "    except torch.OutOfMemoryError as error:\n        raise ValueError('as draw.py says it') from error\n"
        "except ValueError as error:\n    sys.exit(str(error))\n"
    )
    row = programs.run_program([str(tmp_path / "chain.py")], 80)
    assert (row["fits"], row["call_s"]) == (False, None)
    tmp_path.joinpath("other.py").write_text("import sys\nsys.exit('There is no such folder.')")
    with pytest.raises(TutorialError, match="^There is no such folder.$"):
        programs.run_program([str(tmp_path / "other.py")], 80)


def test_draw_that_is_given_too_little_does_not_fit(tmp_path):
    command = [str(programs.PROGRAMS / "draw.py"), str(PACKAGE_ROOT / "checkpoints" / "pocket-flux"), "cat"]
    command += ["--memory-gb", "0.001", "--out", str(tmp_path / "cat.png")]
    row = processes.run_in_fresh_process(programs.run_program, {"command": command, "limit_gb": 80})
    assert (row["fits"], row["call_s"]) == (False, None)


def test_the_limit_of_a_program(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(devices, "limit_memory", limits.append)
    monkeypatch.setattr(devices, "reserved_gb", lambda: 3.0)
    monkeypatch.setattr(measure, "measure_load", lambda function: (function(), measure.Load(9.0, 2.0, 5.0)))
    program = tmp_path / "program.py"
    program.write_text(
        "from helpers import measure\nmeasure.measure_load(lambda: 'cat.png: drawn in 4.25 s, and so on')"
    )
    figures = {"allocated_gb": 2.0, "reserved_gb": 3.0, "host_peak_gb": 5.0}
    assert programs.run_program([str(program)], 4) == {"fits": True, "call_s": 4.25} | figures
    program.write_text("from helpers import measure\nmeasure.measure_load(lambda: None)")  # as save_nf4.py
    assert programs.run_program([str(program)], 24) == {"fits": True, "call_s": 9.0} | figures
    assert limits == [4, 24]


def test_rows(tmp_path, monkeypatch):
    """The program as a whole, with what it runs replaced: each row is written once, with the keys of the others."""
    figures = {"fits": True, "allocated_gb": 6.0, "reserved_gb": 7.0, "call_s": 4.25, "host_peak_gb": 9.0}
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(devices, "device_name", lambda: "a card")
    monkeypatch.setattr(devices, "environment", lambda: {"device": "a card"})
    monkeypatch.setattr(programs, "RESULTS", tmp_path)
    monkeypatch.setattr(processes, "run_in_fresh_process", lambda function, arguments, timeout_s, name: figures)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    asked = SimpleNamespace(**vars(ASKED) | {"saved": PACKAGE_ROOT / "checkpoints" / "pocket-flux", "original": None})
    for card in ("draw.py", "draw.py --compile", "draw.py"):
        asked.only = card
        programs.measure_programs(asked)
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    rows = json.loads((tmp_path / "limits_a-card.json").read_text())
    assert [row["program"] for row in rows] == ["draw.py --compile", "draw.py"]
    assert figures.items() <= rows[0].items()
    for changes, sentence in (({"only": "7 GB"}, "no program for '7 GB'"), ({"saved": None}, "nothing to run")):
        with pytest.raises(TutorialError, match=sentence):
            programs.measure_programs(SimpleNamespace(**vars(asked) | changes))

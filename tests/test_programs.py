"""The programs that a reader copies from the lessons run with the pocket models and draw the same pictures.

Only what must differ on this machine is replaced, listed in `HERE`; blocks are recorded and not compiled, to save time.
"""

import functools
import json
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import programs
from helpers import cpu_backend, devices, quality
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

DEVICE = devices.accelerator()
STREAM = DEVICE.type != "cpu"
HERE = {
    '"black-forest-labs/FLUX.1-dev"': repr(str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")),
    '"Wan-AI/Wan2.1-T2V-14B-Diffusers"': repr(str(PACKAGE_ROOT / "checkpoints" / "pocket-wan")),
    '"cuda"': repr(DEVICE.type),
    "use_stream=True": f"use_stream={STREAM}",
    '"use_stream": True': f'"use_stream": {STREAM}',
    "record_stream=True": f"record_stream={STREAM}",
    "enable_model_cpu_offload()": f"enable_model_cpu_offload(device={DEVICE.type!r})",
    'California")': 'California", height=128, width=128, num_inference_steps=2, max_sequence_length=32)',
    "height=480, width=832, num_frames=81": (
        "height=96, width=96, num_frames=17, num_inference_steps=2, max_sequence_length=32"
    ),
    # The programs name no seed.
    '\npipeline("': '\ntorch.manual_seed(0)\npipeline("',
    "\nframes = pipeline(": "\ntorch.manual_seed(0)\nframes = pipeline(",
}


def run(code):
    for theirs, ours in HERE.items():
        code = code.replace(theirs, ours)
    names = {}
    exec(code, names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    cpu_backend.enable()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with mock.patch.dict(os.environ), torch._dynamo.config.patch(cache_size_limit=8):  # the programs change both
        yield tmp_path
    torch.compiler.reset()


def test_each_replacement_still_finds_something():
    everything = "\n".join(block for lesson in programs.LESSONS.values() for block in programs.blocks(lesson))
    for theirs in HERE:
        assert theirs in everything, f"{theirs} is in no program any more"


def test_flux_programs_draw_the_same(folder):
    run(programs.saving_programs()["flux"])
    pictures = {}
    for name, code in programs.drawing_programs()["flux"].items():
        run(code)
        pictures[name] = Image.open(folder / "cat.png").copy()
        (folder / "cat.png").unlink()
    first = pictures["8 GB"]
    assert first.size == (128, 128) and np.asarray(first).std() > 10
    for name, picture in pictures.items():
        # Compiled, the same arithmetic rounds differently; without nf4 outside the blocks it is another one.
        assert quality.image_distance(picture, first) < 3, name


def test_wan_programs_draw_the_same(folder):
    run(programs.saving_programs()["wan"])
    clips = {}
    for name, code in programs.drawing_programs()["wan"].items():
        clips[name] = run(code)["frames"]
        assert (folder / "output.mp4").stat().st_size > 1000
        (folder / "output.mp4").unlink()
    first = clips["8 GB"]
    assert first.shape == (17, 96, 96, 3) and first.std() > 0.04
    for name, clip in clips.items():
        assert quality.video_distance(clip, first) < 3, name


@pytest.mark.parametrize("model", programs.LESSONS)
def test_a_program_under_a_limit_draws_twice(model, monkeypatch):
    """With what it runs replaced: the limit itself needs a GPU."""
    limits = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for card, program in programs.drawing_programs()[model].items():
        code = programs.under_limit(model, program, "/saved", 8, segments=True, steps=2)
        assert code.index("PYTORCH_ALLOC_CONF") < code.index("import torch") and "'/saved'" in code, card
        without = programs.under_limit(model, program, "/saved", 8, segments=False, steps=None)
        assert "PYTORCH_ALLOC_CONF" not in without and "num_inference_steps" not in without, card
        # All but the lines that load and draw: the limit before them, the report after.
        load, draw = code.split(programs.DRAW[model])[0], code.split(programs.DRAW[model])[1:]
        assert len(draw) == 2 and all("num_inference_steps=2)" in part for part in draw), card
        exec(load.split("\nfrom diffusers")[0], {})
    assert limits == [0.5] * len(programs.drawing_programs()[model])


def test_the_report_is_of_the_second_call(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction: calls.append("limit"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 6e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7e9)
    code = programs.under_limit("flux", 'load()\npipeline("a")\n', "/saved", 8, segments=False, steps=None)
    exec(code, {"load": lambda: calls.append("load"), "pipeline": calls.append})
    assert calls == ["limit", "load", "a", "a", "synchronize"]
    report = json.loads(capsys.readouterr().out)
    assert (report["allocated_gb"], report["reserved_gb"]) == (6, 7) and report["call_s"] > 0


def test_a_program_that_does_not_fit_is_a_row_and_another_failure_is_an_error(capfd):
    fits = 'import json, benchmarks.models; print("noise"); print(json.dumps({"call_s": 1.0}))'
    assert programs.run("It", fits) == {"fits": True, "call_s": 1.0}
    message = "6.51 GiB is allocated by PyTorch, and 388.12 MiB is reserved by PyTorch but unallocated. If reserved"
    row = programs.run("It", f"class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError({message!r})")
    assert row["fits"] is False and row["call_s"] is None
    assert (row["allocated_gb"], row["reserved_gb"]) == pytest.approx((6.99, 7.40), abs=0.01)
    with pytest.raises(TutorialError, match="It failed in its own process: ValueError: no such folder"):
        programs.run("It", "raise ValueError('no such folder')")
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(TutorialError, match="host memory ran out"):
        programs.run("It", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TutorialError, match="ran out of accelerator memory"):
        programs.run("It", "raise RuntimeError('CUDA error: out of memory')")

"""The programs that a reader copies from the lessons run with the pocket models and draw the same pictures.

Only what must differ on this machine is replaced, listed in `HERE`; blocks are recorded and not compiled, to save time.
"""

import functools
import json
import os
import re
from unittest import mock

import numpy as np
import pytest
import torch
from notebook_checks import ROOT
from PIL import Image

from helpers import cpu_backend, measure, quality

DEVICE = measure.accelerator()
STREAM = DEVICE.type != "cpu"
HERE = {
    '"black-forest-labs/FLUX.1-dev"': repr(str(ROOT / "checkpoints" / "pocket-flux")),
    '"Wan-AI/Wan2.1-T2V-14B-Diffusers"': repr(str(ROOT / "checkpoints" / "pocket-wan")),
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


def blocks(lesson):
    cells = json.loads((ROOT / "notebooks" / f"{lesson}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


FLUX_SAVE, FLUX_8, FLUX_12, FLUX_6 = blocks("02_model_cpu_offload")
FLUX_REST_STAYS, WAN_SAVE, WAN_8, WAN_24, WAN_16, WAN_12 = blocks("03_group_offload_video")


def without(code, start, end):
    """`code` in three parts: before the line that begins with `start`, up to that with `end`, and from there on."""
    first, last = code.index(f"\n{start}") + 1, code.index(f"\n{end}") + 1
    assert first < last
    return code[:first], code[first:last], code[last:]


def flux_programs():
    load, _, compile_and_draw = without(FLUX_8, "pipeline.enable_model_cpu_offload", "pipeline.transformer.compile")
    draw = without(FLUX_8, "pipeline.enable_model_cpu_offload", 'pipeline("')[2]
    yield "8 GB", FLUX_8
    yield "12 GB", load + FLUX_12 + compile_and_draw
    yield "6 GB", load + FLUX_6 + draw
    yield "the rest stays", load + FLUX_REST_STAYS + draw


def wan_programs():
    load, _, draw = without(WAN_8, "for part in parts.values()", "prompt = ")
    yield "8 GB", WAN_8
    yield "24 GB", load + WAN_24 + draw
    yield "16 GB", load + WAN_16 + draw
    yield "12 GB", load + WAN_12 + draw


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
    everything = "\n".join([*blocks("02_model_cpu_offload"), *blocks("03_group_offload_video")])
    for theirs in HERE:
        assert theirs in everything, f"{theirs} is in no program any more"


def test_flux_programs_draw_the_same(folder):
    run(FLUX_SAVE)
    pictures = {}
    for name, code in flux_programs():
        run(code)
        pictures[name] = Image.open(folder / "cat.png").copy()
        (folder / "cat.png").unlink()
    first = pictures["8 GB"]
    assert first.size == (128, 128) and np.asarray(first).std() > 10
    for name, picture in pictures.items():
        # Compiled, the same arithmetic rounds differently; without nf4 outside the blocks it is another one.
        assert quality.image_distance(picture, first) < 3, name


def test_wan_programs_draw_the_same(folder):
    run(WAN_SAVE)
    clips = {}
    for name, code in wan_programs():
        clips[name] = run(code)["frames"]
        assert (folder / "output.mp4").stat().st_size > 1000
        (folder / "output.mp4").unlink()
    first = clips["8 GB"]
    assert first.shape == (17, 96, 96, 3) and first.std() > 0.04
    for name, clip in clips.items():
        assert quality.video_distance(clip, first) < 3, name

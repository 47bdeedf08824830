"""programs/draw.py: the picture is that of a plain call, and what cannot be is said before anything is loaded."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import diffusers
import draw
import imageio.v3 as imageio
import numpy as np
import pytest
import save_nf4
import tiny_pipelines
import torch
from conftest import build_pipeline
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from PIL import Image
from test_save_nf4 import with_controlnet

from helpers import devices, models
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

PROGRAM = PACKAGE_ROOT / "programs" / "draw.py"
LITTLE_GB = "0.3" if torch.cuda.is_available() else "0.0015"  # a card has no pages so small
SMALL = "--width 32 --height 32 --steps 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: the folder of a family's checkpoint, in bfloat16 or in nf4."""
    parent = tmp_path_factory.mktemp("draw")

    def find(family, nf4=False):
        plain, saved = parent / family, parent / f"{family}-nf4"
        if not plain.exists():
            tiny_pipelines.save(family, plain) if family != "flux" else build_pipeline().save_pretrained(plain)
        if nf4 and not saved.exists():
            save_nf4.main([str(plain), str(saved)])
        return saved if nf4 else plain

    return find


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    with torch._dynamo.config.patch(cache_size_limit=8):  # the program changes it
        yield tmp_path


def refusal(*arguments):
    """The sentence that the program ends with."""
    with pytest.raises(SystemExit) as stopped:
        draw.main([*map(str, arguments)])
    return str(stopped.value)


def call_plainly(path, **call):
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16).to(devices.accelerator())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("cat", **call, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
def test_the_picture_is_that_of_a_plain_call(nf4, folder, here, capsys):
    path = folder("flux", nf4)
    draw.main([str(path), "cat", *SMALL, "--guidance-scale", "3", "--seed", "5", "--memory-gb", LITTLE_GB])
    expected = call_plainly(path, width=32, height=32, num_inference_steps=2, guidance_scale=3.0).images[0]
    assert np.array_equal(np.asarray(Image.open(here / "picture.png")), np.asarray(expected))
    said = capsys.readouterr().out
    assert f"Loading {path}" in said and "transformer (0." in said and "Expected: " in said
    assert said.splitlines()[-1].startswith("picture.png: drawn in ") and said.endswith("GB of host memory.\n")
    draw.main([str(path), "cat", *SMALL, "--guidance-scale", "3"])  # without a limit, over the same file
    assert not np.array_equal(np.asarray(Image.open(here / "picture.png")), np.asarray(expected))  # another seed


def test_sd3_without_its_third_text_encoder(here):
    pipeline = tiny_pipelines.build("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(here / "sd3")
    draw.main([str(here / "sd3"), "cat", *SMALL])
    assert (here / "picture.png").is_file()


def test_a_clip_in_both_formats(folder, here):
    path, options = folder("wan22", nf4=True), "--width 32 --height 32 --steps 1 --frames 5 --seed 5".split()
    draw.main([str(path), "cat", *options])
    written = imageio.immeta(here / "clip.mp4", plugin="FFMPEG")
    assert written["fps"] == 16 and written["size"] == (32, 32)
    assert len(imageio.imread(here / "clip.mp4", plugin="FFMPEG")) == 5
    draw.main([str(path), "cat", *options, "--out", "deep/cat.gif", "--fps", "10"])
    with Image.open(here / "deep" / "cat.gif") as clip:
        assert (clip.n_frames, clip.info["duration"], clip.info["loop"]) == (5, 100, 0)


def test_a_clip_at_the_frame_rate_of_its_model(folder, here):
    draw.main([str(folder("ltx")), "cat", *"--width 32 --height 32 --steps 1 --frames 9".split()])
    assert imageio.immeta(here / "clip.mp4", plugin="FFMPEG")["fps"] == 25


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that only seems to be one."""
    clip = [Image.new("RGB", (32, 32))] * 3
    pipeline = mock.Mock(return_value=LTX2PipelineOutput(frames=[clip], audio=torch.zeros(1)))
    monkeypatch.setattr(draw, "load", lambda *arguments: pipeline)
    monkeypatch.setattr(draw, "fill_card", mock.Mock())
    return pipeline


def test_a_clip_with_sound_is_said_to_lack_it(folder, pipeline, here, capsys):
    draw.main([str(folder("ltx2")), "cat"])
    assert "clip.mp4, without its sound: drawn in " in capsys.readouterr().out
    assert imageio.immeta(here / "clip.mp4", plugin="FFMPEG")["fps"] == 24


def test_a_card_that_runs_out_of_memory_while_drawing(folder, pipeline, here):
    pipeline.side_effect = torch.OutOfMemoryError("a screen full")
    assert refusal(folder("ltx2"), "cat") == "The card ran out of memory: draw smaller, or give more by --memory-gb."


def test_blocks_are_compiled_only_if_asked_for(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: compiled.append((self, settings)))
    draw.main([str(folder("sd3")), "cat", *SMALL])
    assert compiled == []
    draw.main([str(folder("sd3")), "cat", *SMALL, "--compile"])
    assert [type(block).__name__ for block, _ in compiled] == ["JointTransformerBlock"] * 2
    draw.main([str(folder("wan22")), "cat", *SMALL, "--frames", "5", "--compile"])
    assert [type(block).__name__ for block, _ in compiled[2:]] == ["WanTransformerBlock"] * 4


def test_on_a_card_pytorch_may_reserve_no_more(folder, monkeypatch):
    """With a card that is none: what it reserves is seen on a real one only."""
    limits, order = [], []
    monkeypatch.setattr(draw, "load", lambda *arguments: order.append("load"))
    monkeypatch.setattr(devices, "limit_memory", lambda limit_gb: limits.append((limit_gb, list(order))))
    for limit in (["--memory-gb", "8"], ["--memory-gb", "80"], []):
        with pytest.raises(AttributeError):  # there is no pipeline
            draw.main([str(folder("sd3")), "cat", *limit])
    assert limits == [(8, []), (80, ["load"])]


def test_what_is_said_before_anything_is_loaded(folder, here, monkeypatch):
    monkeypatch.setattr(draw, "load", mock.Mock(side_effect=AssertionError("loaded")))
    picture, clip = folder("sd3"), folder("wan22")
    assert refusal(picture, "cat", "--frames", 5) == (
        "A StableDiffusion3Pipeline takes no num_frames: leave --frames out."
    )
    assert refusal(picture, "cat", "--out", "cat.mp4").startswith("cat.mp4 is no name for a picture: let it end with")
    assert refusal(clip, "cat", "--out", "cat.png") == "cat.png is no name for a clip: let it end with .mp4 or .gif."
    (here / "folder.png").mkdir()
    assert refusal(picture, "cat", "--out", "folder.png") == "folder.png cannot be overwritten: give another --out."
    (here / "file").touch()
    assert "cannot be written (a file stands where a folder must be)" in refusal(picture, "cat", "--out", "file/a.png")
    assert refusal(here / "nothing", "cat").startswith("There is no folder")
    assert "model_index.json is missing" in refusal(here, "cat")
    with_controlnet(here / "net")
    assert "draws no picture or clip from a prompt alone" in refusal(here / "net", "cat")
    assert not list(here.glob("*.*4"))


def test_pipelines_of_several_pipelines(folder, monkeypatch):
    """diffusers loads such a one without a device_map only."""
    model = models.find_model(str(folder("sd3")))
    monkeypatch.setattr(model.pipeline_class, "_load_connected_pipes", True)
    assert draw.load(model, compiled=False).transformer.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("WanPipeline", {"num_frames": 5}),
        ("SanaVideoPipeline", {"frames": 5}),
        ("LattePipeline", {"video_length": 5}),
        ("Kandinsky6TI2VAPipeline", {"num_frames": 5}),
        ("StableAudioPipeline", None),
        ("QwenImageEditPipeline", None),
        ("LTXImageToVideoPipeline", None),
        ("StableCascadePriorPipeline", None),
    ],
)
def test_each_pipeline_is_called_in_its_own_words(kind, call, here):
    (here / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    model = SimpleNamespace(path=str(here), pipeline_class=getattr(diffusers, kind))
    args = SimpleNamespace(
        prompt="cat", frames=5, width=None, height=8, steps=1, guidance_scale=None, negative_prompt=None
    )
    if call is None:
        with pytest.raises(TutorialError, match=f"A {kind} draws no picture or clip"):
            draw.find_call(model, args)
    else:
        small = {"prompt": "cat", "output_type": "pil", "height": 8, "num_inference_steps": 1}
        assert draw.find_call(model, args) == small | call


@pytest.mark.parametrize("given", [None, 9])
def test_a_schedule_for_other_steps_is_left_out(given, here):
    (here / "model_index.json").write_text('{"_class_name": "Ideogram4Pipeline"}')
    model = SimpleNamespace(path=str(here), pipeline_class=diffusers.Ideogram4Pipeline)
    args = SimpleNamespace(prompt="cat", steps=given, **dict.fromkeys(set(draw.OPTIONS) - {"steps"}))
    schedule = {} if given is None else {"num_inference_steps": 9, "guidance_schedule": None}
    assert draw.find_call(model, args) == {"prompt": "cat", "output_type": "pil"} | schedule


@pytest.mark.parametrize("option", ["--memory-gb", "--width", "--height", "--steps", "--frames", "--fps"])
def test_numbers_that_cannot_be(option, capsys):
    assert refusal("folder", "cat", option, 0) == "2"
    assert f"{option} must be more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "range"),
    [("--memory-gb", "inf", "finite"), ("--memory-gb", "nan", "finite"), ("--guidance-scale", "-1", "0 or more")]
    + [("--guidance-scale", "nan", "0 or more"), ("--seed", "-1", "from 0 to"), ("--seed", str(2**64), "from 0 to")],
)
def test_numbers_out_of_range(option, value, range, capsys):
    assert refusal("folder", "cat", option, value) == "2"
    assert f"{option} must be" in (said := capsys.readouterr().err) and range in said


def test_too_little_memory(folder):
    said = refusal(folder("sd3"), "cat", *SMALL, "--memory-gb", "0.0000001")
    devices.limit_memory(1000)  # the limit holds for the whole process
    assert said.startswith(("With every block streamed a call takes ", "The card has no room")) and "give more" in said


def test_a_size_that_cannot_be_is_said_before_the_weights_are_sorted(folder, monkeypatch):
    monkeypatch.setattr(draw, "fill_card", None)
    assert "divisible by" in refusal(folder("sd3"), "cat", "--height", "33", "--width", "32")


@pytest.mark.parametrize("has_check", [True, False])
def test_a_call_is_checked_with_what_the_pipeline_makes_of_it(has_check):
    """Some draw the nearest of their own sizes. And what checks nothing must not draw here, on the CPU."""

    class Binning(DiffusionPipeline):
        drawn = False

        def __call__(self, height):
            height = height // 32 * 32
            if has_check:
                self.check_inputs(height)
            self.drawn = True

        def check_inputs(self, height):
            if height != 64:
                raise ValueError(f"{height} is no height of this model")

    if not has_check:
        Binning.__call__ = lambda self, height: setattr(self, "drawn", True)
    pipeline = Binning()
    draw.check_call(pipeline, {"height": 65})
    if has_check:
        with pytest.raises(ValueError, match="96 is no height"):
            draw.check_call(pipeline, {"height": 99})
    assert not pipeline.drawn
    pipeline(height=64)
    assert pipeline.drawn


@pytest.mark.parametrize(
    ("options", "nf4", "way"),
    [
        (["--height", "64", "--width", "64"], False, "change or leave out --width, --height."),
        (["--steps", "1"], False, "change or leave out --steps."),
        (["--steps", "1"], True, "change or leave out --steps, or draw from the model that it was before nf4."),
        ([], True, "draw from the model that it was before nf4."),
    ],
)
def test_what_a_model_cannot_draw(options, nf4, way, folder, monkeypatch):
    monkeypatch.setattr(draw, "fill_card", mock.Mock(side_effect=IndexError("tuple index out of range")))
    said = refusal(folder("sd3", nf4), "cat", *options)
    assert said == f"The model does not draw like this (IndexError: tuple index out of range): {way}"


def test_an_error_that_no_option_has_to_do_with_is_shown_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(draw, "fill_card", mock.Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        draw.main([str(folder("sd3")), "cat"])


def test_a_package_that_a_model_needs(folder, monkeypatch):
    monkeypatch.setattr(draw, "fill_card", mock.Mock(side_effect=ImportError("\nIt requires\nTorchvision.\n")))
    assert refusal(folder("sd3"), "cat") == "This model needs one more package: It requires Torchvision."


def test_the_allocator_is_told_before_torch_is_imported(monkeypatch, capsys):
    code = PROGRAM.read_text(encoding="utf-8")
    assert code.index("signal.signal(") < code.index("PYTORCH_ALLOC_CONF") < code.index("\nimport helpers")
    monkeypatch.setattr(sys, "argv", ["draw.py", "--help"])
    monkeypatch.setattr(signal, "signal", mock.Mock())
    for before, after in ((None, "expandable_segments:True"), ("mine", "mine")):
        with mock.patch.dict(os.environ, {"PYTORCH_ALLOC_CONF": before} if before else {}):
            with pytest.raises(SystemExit):
                runpy.run_path(str(PROGRAM), run_name="__main__")
            assert os.environ["PYTORCH_ALLOC_CONF"] == after
    assert "--memory-gb" in capsys.readouterr().out


def test_a_program_starts_quietly_and_ctrl_c_is_one_word(folder, here):
    command = [sys.executable, str(PROGRAM), str(folder("sd3")), "cat", *SMALL[:-1], "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("Expected: "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    *before, last = [line for line in said.splitlines() if line]
    assert (process.returncode, last) == (130, "Stopped.")
    # On a GPU one step measures first.
    assert all("Drawing" in line or "One step" in line for line in before), said

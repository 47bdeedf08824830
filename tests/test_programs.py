"""The programs that a reader copies from the lessons run with the pocket models, draw the same pictures, and do what
they are for: each says here what it does to the pipeline, so that no line of it can be lost.

Only what must differ on this machine is replaced, listed in `HERE`; blocks are recorded and not compiled, to save time.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v3 as imageio
import numpy as np
import pipeline_checks as checks
import pytest
import torch
from PIL import Image

from benchmarks import programs
from helpers import cpu_backend, devices, measure, processes, quality
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

DEVICE = devices.accelerator()
HERE = {
    '"black-forest-labs/FLUX.1-dev"': repr(str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")),
    '"Wan-AI/Wan2.1-T2V-14B-Diffusers"': repr(str(PACKAGE_ROOT / "checkpoints" / "pocket-wan")),
    '"cuda"': repr(DEVICE.type),
    "enable_model_cpu_offload()": f"enable_model_cpu_offload(device={DEVICE.type!r})",
    'California")': 'California", height=128, width=128, num_inference_steps=2, max_sequence_length=32)',
    "height=480, width=832, num_frames=81": (
        "height=96, width=96, num_frames=17, num_inference_steps=2, max_sequence_length=32"
    ),
    # The programs name no seed.
    '\npipeline("': '\ntorch.manual_seed(0)\npipeline("',
    "\nframes = pipeline(": "\ntorch.manual_seed(0)\nframes = pipeline(",
}
ENCODERS = {"flux": {"text_encoder", "text_encoder_2"}, "wan": {"text_encoder"}}
LARGE = {"flux": {"transformer": {""}, "text_encoder_2": {"wo"}}, "wan": {"transformer": {""}, "text_encoder": {"wo"}}}
PARTS = {model: ENCODERS[model] | {"transformer", "vae"} for model in LARGE}


def leaves(*parts):
    return dict.fromkeys(parts, "leaf_level")


# For each program: where the components are (default: on the card), and whether the blocks are compiled.
PROGRAMS = {
    ("flux", "8 GB"): (dict.fromkeys(PARTS["flux"], "model offload"), True),
    ("flux", "12 GB"): (leaves("text_encoder", "text_encoder_2"), True),
    ("flux", "6 GB"): (leaves(*PARTS["flux"]), False),
    ("flux", "the rest stays"): (leaves(*PARTS["flux"]) | {"transformer": "block_level"}, True),
    ("wan", "8 GB"): (leaves(*PARTS["wan"]) | {"transformer": "block_level"}, True),
    ("wan", "24 GB"): ({}, True),
    ("wan", "16 GB"): (leaves("text_encoder"), True),
    ("wan", "12 GB"): (dict.fromkeys(PARTS["wan"], "model offload"), True),
}


def run(code, monkeypatch):
    for theirs, ours in HERE.items():
        code = code.replace(theirs, ours)
    spy = checks.Spy(DEVICE)
    torch._dynamo.config.cache_size_limit = 8
    return spy.run(code, monkeypatch), spy


@pytest.fixture
def folder(tmp_path, monkeypatch):
    cpu_backend.enable()
    monkeypatch.chdir(tmp_path)
    with (
        mock.patch.dict(os.environ),
        torch._dynamo.config.patch(cache_size_limit=8, capture_dynamic_output_shape_ops=False),
    ):  # the programs change these
        yield tmp_path
    torch.compiler.reset()


def check_weights(model, parts, spy):
    """The two large components are nf4, in all but what must not be, and were loaded into host memory."""
    for name, without in LARGE[model].items():
        left = {layer.split(".")[-1] for layer in checks.unquantized(parts[name])}
        outside = {layer for layer in checks.unquantized(parts[name]) if layer.split(".")[0].endswith("blocks")}
        assert left <= without if name != "transformer" else not outside, f"{name}: {left} are not quantized"
    assert spy.device_maps == dict.fromkeys(LARGE[model], "cpu")
    assert all(parts[name] is spy.loaded[name] for name in LARGE[model]), "a component was loaded again"


def check_drawing_program(model, card, pipeline, spy):
    """What the program for a card does, as `PROGRAMS` says."""
    parts = devices.component_modules(pipeline)
    places, compiled = PROGRAMS[model, card]
    assert checks.placement(pipeline, spy) == dict.fromkeys(PARTS[model], "on the card") | places
    check_weights(model, parts, spy)
    assert set.union(*map(checks.dtypes, parts.values())) == {torch.bfloat16, torch.uint8}
    assert spy.allocator == "expandable_segments:True"
    assert len(spy.compiled) == (len(checks.blocks(pipeline.transformer)) if compiled else 0)
    assert all(settings.get("fullgraph") for settings in spy.compiled)
    for name, settings in checks.streams(pipeline, spy).items():
        record = {"record_stream"} if (card, name) == ("the rest stays", "transformer") else set()
        assert settings == {"use_stream"} | record, name
        assert name not in LARGE[model] or checks.quant_states_sent(parts[name], spy), name
    if places.get("transformer") == "block_level":  # these go back without a stream, and an nf4 weight cannot
        outside = [name for name, layer in parts["transformer"].named_children() if not name.endswith("blocks")]
        assert not any(
            isinstance(layer, checks.Linear4bit)
            for name in outside
            for layer in getattr(parts["transformer"], name).modules()
        )
    if card == "the rest stays":
        assert checks.rest_stays(pipeline.transformer)


def test_each_program_is_known():
    assert {(model, card) for model, cards in programs.drawing_programs().items() for card in cards} == set(PROGRAMS)


def test_each_replacement_still_finds_something():
    everything = "\n".join(block for lesson in programs.LESSONS.values() for block in programs.blocks(lesson))
    for theirs in HERE:
        assert theirs in everything, f"{theirs} is in no program any more"


@pytest.mark.parametrize("of_the_guide", [False, True])
def test_the_programs_of_lesson_1(folder, monkeypatch, of_the_guide):
    """The lesson's own, and the guide's recipe 1: a block with its first line, and the two that compile."""
    code, guide = programs.blocks("01_quantize_and_compile")
    if of_the_guide:
        setting, *compiling = [line for line in guide.splitlines() if line]
        own = "pipeline.transformer.compile_repeated_blocks(fullgraph=True)"
        assert own in code
        code = code.replace("\n\npipeline =", f"\n\n{setting}\n\npipeline =").replace(own, "\n".join(compiling))
    names, spy = run(code, monkeypatch)
    pipeline = names["pipeline"]
    assert checks.placement(pipeline, spy) == dict.fromkeys(PARTS["flux"], "on the card")
    assert checks.unquantized(pipeline.transformer) == []
    assert {name.split(".")[-1] for name in checks.unquantized(pipeline.text_encoder_2)} == {"wo"}
    parts = devices.component_modules(pipeline)
    assert set.union(*map(checks.dtypes, parts.values())) == {torch.bfloat16, torch.uint8}
    assert all(settings.get("fullgraph") for settings in spy.compiled)
    if of_the_guide:
        assert len(spy.compiled) == 1 and spy.compiled[0]["mode"] == "max-autotune"
    else:
        assert len(spy.compiled) == len(checks.blocks(pipeline.transformer))
    assert spy.memory_formats == [torch.channels_last] * of_the_guide
    assert torch._dynamo.config.capture_dynamic_output_shape_ops == of_the_guide


def test_flux_programs_draw_the_same(folder, monkeypatch):
    names, spy = run(programs.saving_programs()["flux"], monkeypatch)
    check_weights("flux", names["parts"], spy)
    pictures = {}
    for name, code in programs.drawing_programs()["flux"].items():
        names, spy = run(code, monkeypatch)
        check_drawing_program("flux", name, names["pipeline"], spy)
        assert torch._dynamo.config.cache_size_limit == 1000, name
        pictures[name] = Image.open(folder / "cat.png").copy()
        (folder / "cat.png").unlink()
    first = pictures["8 GB"]
    assert first.size == (128, 128) and np.asarray(first).std() > 10
    for name, picture in pictures.items():
        # Compiled, the same arithmetic rounds differently; without nf4 outside the blocks it is another one.
        assert quality.image_distance(picture, first) < 3, name


def test_wan_programs_draw_the_same(folder, monkeypatch):
    names, spy = run(programs.saving_programs()["wan"], monkeypatch)
    check_weights("wan", names["parts"], spy)
    clips = {}
    for name, code in programs.drawing_programs()["wan"].items():
        names, spy = run(code, monkeypatch)
        check_drawing_program("wan", name, names["pipeline"], spy)
        clips[name] = names["frames"]
        written = imageio.immeta(folder / "output.mp4", plugin="FFMPEG")
        assert written["fps"] == 16 and written["size"] == (96, 96) and written["duration"] > 1
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
    fits = 'import json, benchmarks.strategies; print("noise"); print(json.dumps({"call_s": 1.0}))'
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


# The programs of programs/


ASKED = SimpleNamespace(
    model="flux", saved="nf4-flux", original="flux", limit=7.5, steps=2, card=None, no_segments=False
)
CALL = ["--width", "32", "--height", "32"]


def test_command_lines_of_the_programs_to_take_home(tmp_path):
    commands = programs.take_home_commands(ASKED, tmp_path)
    assert tuple(commands) == (*programs.DRAWING, *programs.SAVING)
    for name, (program, *arguments) in commands.items():
        assert Path(program).is_file() and Path(program).name == name.split()[0]
        assert arguments[0] == ("nf4-flux" if name in programs.DRAWING else "flux")
        assert arguments[-len(name.split()[1:]) or len(arguments) :] == name.split()[1:]
    assert commands["draw.py"][2:] == ["a cat in a pool", *"--memory-gb 7.5 --out".split(), *commands["draw.py"][6:]]
    assert commands["draw.py"][-2:] == ["--steps", "2"]
    draws = programs.find_runs(SimpleNamespace(**vars(ASKED) | {"saved": Path("nf4-flux"), "original": None}), tmp_path)
    assert list(draws) == [*programs.drawing_programs()["flux"], *programs.DRAWING]
    saves = programs.find_runs(SimpleNamespace(**vars(ASKED) | {"saved": None}), tmp_path)
    assert list(saves) == list(programs.SAVING)


def test_programs_to_take_home_run_in_processes_of_their_own(tiny_checkpoint, tmp_path):
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


def test_a_program_to_take_home_that_does_not_fit_is_a_row(tmp_path):
    tmp_path.joinpath("chain.py").write_text(
        "import sys, torch\n"
        "try:\n    try:\n        raise torch.OutOfMemoryError('much')\n"
        "    except torch.OutOfMemoryError as error:\n        raise ValueError('as draw.py says it') from error\n"
        "except ValueError as error:\n    sys.exit(str(error))\n"
    )
    row = programs.run_take_home([str(tmp_path / "chain.py")], 80)
    assert (row["fits"], row["call_s"]) == (False, None)
    tmp_path.joinpath("other.py").write_text("import sys\nsys.exit('There is no such folder.')")
    with pytest.raises(TutorialError, match="^There is no such folder.$"):
        programs.run_take_home([str(tmp_path / "other.py")], 80)


def test_draw_that_is_given_too_little_does_not_fit(tmp_path):
    command = [str(programs.PROGRAMS / "draw.py"), str(PACKAGE_ROOT / "checkpoints" / "pocket-flux"), "cat"]
    command += ["--memory-gb", "0.001", "--out", str(tmp_path / "cat.png")]
    row = processes.run_in_fresh_process(programs.run_take_home, {"command": command, "limit_gb": 80})
    assert (row["fits"], row["call_s"]) == (False, None)


def test_the_limit_of_a_program_to_take_home(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(devices, "reserved_gb", lambda: 3.0)
    monkeypatch.setattr(measure, "measure_load", lambda function: (function(), measure.Load(9.0, 2.0, 5.0)))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (12e9, 16e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    program = tmp_path / "program.py"
    program.write_text(
        "from helpers import measure\nmeasure.measure_load(lambda: 'cat.png: drawn in 4.25 s, and so on')"
    )
    figures = {"allocated_gb": 2.0, "reserved_gb": 3.0, "host_peak_gb": 5.0}
    assert programs.run_take_home([str(program)], 4) == {"fits": True, "call_s": 4.25} | figures
    program.write_text("from helpers import measure\nmeasure.measure_load(lambda: None)")  # as save_nf4.py
    assert programs.run_take_home([str(program)], 24) == {"fits": True, "call_s": 9.0} | figures
    assert limits == [0.25, 1.0]


def test_rows_of_the_programs_to_take_home(tmp_path, monkeypatch):
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
        asked.card = card
        programs.measure_programs(asked)
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    rows = json.loads((tmp_path / "limits_a-card.json").read_text())
    assert [row["card"] for row in rows] == ["draw.py --compile", "draw.py"]
    recorded = json.loads((PACKAGE_ROOT / "benchmarks" / "results" / "limits_nvidia-h200.json").read_text())[0]
    assert rows[0].keys() <= {*recorded, "host_peak_gb"} and figures.items() <= rows[0].items()
    for changes, sentence in (({"card": "7 GB"}, "no program for '7 GB'"), ({"saved": None}, "nothing to run")):
        with pytest.raises(TutorialError, match=sentence):
            programs.measure_programs(SimpleNamespace(**vars(asked) | changes))

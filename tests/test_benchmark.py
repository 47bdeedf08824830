"""The benchmark program, on tiny checkpoints of many families."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import psutil
import pytest
import tiny_pipelines
import torch
from PIL import Image
from torch._inductor import config

from benchmarks import __main__ as program
from benchmarks import strategies
from helpers import cpu_backend, devices, models, processes, records
from helpers.checkpoints import Checkpoint
from helpers.errors import TutorialError
from helpers.models import Model

ROOT = Path(__file__).resolve().parents[1]
# denoisers, text encoders, what is quantized
FOUND = {
    "sd3": ("transformer", "text_encoder text_encoder_2 text_encoder_3", "transformer text_encoder_3"),
    "sdxl": ("unet", "text_encoder text_encoder_2", "unet text_encoder text_encoder_2"),
    "pixart": ("transformer", "text_encoder", "transformer text_encoder"),
    "ltx": ("transformer", "text_encoder", "transformer text_encoder"),
    "ltx2": ("transformer", "text_encoder", "transformer text_encoder"),
    "hunyuan-video": ("transformer", "text_encoder text_encoder_2", "transformer text_encoder"),
    "qwen-image": ("transformer", "text_encoder", "transformer text_encoder"),
    "flux2": ("transformer", "text_encoder", "transformer text_encoder"),
    "lumina2": ("transformer", "text_encoder", "transformer text_encoder"),
    "wan22": ("transformer transformer_2", "text_encoder", "transformer transformer_2 text_encoder"),
    "z-image": ("transformer", "text_encoder", "transformer text_encoder"),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function: the folder of a family's checkpoint, written at the first call."""
    parent = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        place = parent / family
        return place if place.is_dir() else tiny_pipelines.save(family, place)

    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder of the program, for one test."""
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor")
    )  # restored afterwards: the program sets it
    return tmp_path / "cache"


def draw(pipeline, family: str) -> torch.Tensor:
    """What a pipeline draws in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        prompt="a lighthouse",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **tiny_pipelines.CALLS[family],
    )
    return torch.tensor(output.frames if hasattr(output, "frames") else output.images)


# What a checkpoint is made of


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_components_are_found(family, checkpoint):
    model = models.find_model(str(checkpoint(family)))
    denoisers, encoders, quantized = (tuple(names.split()) for names in FOUND[family])
    vaes = ("vae", "audio_vae") if family == "ltx2" else ("vae",)
    assert (model.denoisers, model.quantized) == (denoisers, quantized) and set(model.vaes) == set(vaes)
    assert set(model.text_encoders) == set(encoders)
    assert all(model.sizes[name] > 10_000 for name in (*denoisers, *encoders, "vae"))
    assert (model.variant, model.is_quantized, model.saved) == (None, False, "")


def test_weights_in_the_fp16_variant_only(checkpoint, tmp_path):
    tiny_pipelines.build("sdxl").save_pretrained(tmp_path, variant="fp16")
    vae = tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.safetensors"))  # a mixture is what is on the Hub
    model = models.find_model(str(tmp_path))
    assert model.variant == "fp16" and model.sizes == models.find_model(str(checkpoint("sdxl"))).sizes
    assert strategies.load_bf16(model).unet.dtype == torch.bfloat16


# The strategies


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_strategies_draw_the_same(family, checkpoint, tmp_path):
    model = models.find_model(str(checkpoint(family)))
    strategies.save_nf4(asdict(model), str(tmp_path))
    arguments = asdict(replace(model, saved=str(tmp_path)))

    call = {"prompt": "a lighthouse"} | tiny_pipelines.CALLS[family]

    def run(name: str) -> tuple[torch.Tensor, set[str]]:
        pipeline = strategies.assemble(name, arguments, call)
        if "streamed" in name and devices.accelerator().type == "cpu":
            assert tiny_pipelines.streams(pipeline, model.denoisers)
        sizes = devices.component_footprints(pipeline)
        return draw(pipeline, family), {part for part in sizes if "nf4" in sizes[part]}

    reference, nf4 = run("bf16, resident, eager")
    assert reference.isfinite().all() and nf4 == set()
    quantized, nf4 = run("nf4, resident, eager")
    assert nf4 == set(model.quantized) and 0 < (quantized - reference).abs().mean() < 0.1
    torch.testing.assert_close(run("nf4, model offload, eager")[0], quantized)
    leaves, nf4 = run("saved nf4, leaf group offload, eager")
    assert nf4 == set(model.quantized) and 0 < (leaves - reference).abs().mean() < 0.1
    for name in ("block group offload", "block group offload with the rest on the card"):
        picture = run(f"saved nf4, {name}, eager")[0]
        if devices.accelerator().type == "cpu":
            torch.testing.assert_close(picture, leaves)
        else:  # what is outside of the blocks is no longer nf4 there, and a GPU rounds the two products differently
            assert (picture - leaves).abs().mean() < 0.01
    limit = tiny_pipelines.tight_limit(strategies.load_saved_nf4(Model(**arguments)), call)
    torch.testing.assert_close(run(f"saved nf4, streamed, {limit:.9f} GB, eager")[0], leaves)


# Ways to place weights that change no arithmetic.
SAME = ("resident", "model offload", "block group offload", "streamed")
# Why a pipeline cannot be called with a scheduler, whoever measures: it is left out.
REFUSED = "does not support custom sigmas|no attribute 'init_noise_sigma'|no attribute 'set_begin_index'|by non-int"
REFUSED_COMPATIBLE = {"PNDMScheduler {}": "could not be broadcast together"}  # more Runge-Kutta steps than there are
NOT_MADE = {
    "LMSDiscreteScheduler": "requires the scipy library",
    "DPMSolverSDEScheduler": "requires the torchsde library",
    "EDMEulerScheduler": "'NoneType' and 'float'",  # without a lowest sigma in the configuration
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of schedulers in combinations that nobody uses
@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_placements_draw_the_same_with_every_scheduler(family, checkpoint, monkeypatch):
    """The latents of `assemble`, measured, are those of a plain pipeline, bit for bit: reports.md, R1 and R10.

    With every scheduler that is compatible with that of the family, and settings that draw noise or step along a flow.
    """
    model = models.find_model(str(checkpoint(family)))
    call = {"prompt": "a lighthouse", "num_inference_steps": 3, "output_type": "latent"} | tiny_pipelines.CALLS[family]
    chosen = Checkpoint("tiny", "given", model.path, (call["prompt"],))
    outputs, measure_run = [], processes.measure_run

    def keep(function, **settings):
        torch.manual_seed(0)  # some schedulers draw from the generator of the process, which is a new one elsewhere
        run = measure_run(function, **settings)
        outputs.append(run.output)
        return run

    monkeypatch.setattr(processes, "measure_run", keep)

    def measured(pipeline) -> list[torch.Tensor]:
        processes.measure_here(lambda: (pipeline, call | {"return_dict": False}), chosen, family, repeats=1)
        return [torch.as_tensor(part) for part in outputs[-1] if part is not None]  # LTX-2: video and sound

    def not_measured(pipeline) -> list[torch.Tensor]:
        torch.manual_seed(0)
        for _ in range(2):  # the second counts, as of the measured ones
            output = pipeline(**call, generator=torch.Generator().manual_seed(0), return_dict=False)
        return [torch.as_tensor(part) for part in output if part is not None]

    plain = strategies.load_bf16(model).to(devices.accelerator())
    limit = tiny_pipelines.tight_limit(strategies.load_bf16(model), call)
    names = [f"bf16, {way}, eager".replace("streamed", f"streamed, {limit:.9f} GB") for way in SAME]
    pipelines = {name: strategies.assemble(name, asdict(model), call) for name in names}
    for pipeline in (plain, *pipelines.values()):
        pipeline.set_progress_bar_config(disable=True)
        tiny_pipelines.encode_once(pipeline)
    made, working = tiny_pipelines.schedulers(plain), []
    config, own = plain.scheduler.config, f"{type(plain.scheduler).__name__} {{}}"
    for missing in {cls for cls in plain.scheduler.compatibles if f"{cls.__name__} {{}}" not in made}:
        with pytest.raises((ImportError, TypeError), match=NOT_MADE[missing.__name__]):
            missing.from_config(config)
    compatible = [f"{cls.__name__} {{}}" for cls in plain.scheduler.compatibles]
    for name in [name for name in made if name in compatible or not name.endswith("{}")]:
        kind, settings = type(made[name]), made[name].config
        plain.scheduler = kind.from_config(settings)
        try:
            expected = not_measured(plain)
        except Exception as error:
            reason = REFUSED_COMPATIBLE[name] if name in compatible else REFUSED
            assert re.search(reason, str(error)), (name, error)
            continue
        assert all(part.isfinite().all() for part in expected), name
        for way, pipeline in pipelines.items():
            pipeline.scheduler = kind.from_config(settings)
            assert all(torch.equal(*pair) for pair in zip(measured(pipeline), expected, strict=True)), (way, name)
        working.append(name)
    assert own in working and len(working) >= {"sdxl": 14, "pixart": 14, "sd3": 5, "wan22": 5}.get(family, 2), working


@pytest.mark.parametrize("family", ["sd3", "sdxl", "wan22"])  # diffusers names the blocks of the last two only
def test_repeated_blocks_are_compiled(family, checkpoint, monkeypatch):
    compiled = []

    def compile_cheaply(function, **settings):
        compiled.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_cheaply)
    model = models.find_model(str(checkpoint(family)))
    expected = {
        "sd3": 2 * ["JointTransformerBlock"],
        "sdxl": 4 * ["BasicTransformerBlock"],
        "wan22": 4 * ["WanTransformerBlock"],
    }
    for compilation in (strategies.compile_blocks, strategies.compile_inside):
        compiled.clear()
        compilation(strategies.load_bf16(model), model)
        assert compiled == expected[family]


def test_combinations_are_made_of_strategies():
    for name in (*strategies.COMBINATIONS, *strategies.VARIANTS, *strategies.PEERS):
        if name not in strategies.RECIPES:
            assert strategies.is_combination(name)
            start, *placement, compilation = strategies.split_cache(name)[0].split(", ")
            assert start in strategies.STARTS and ", ".join(placement) in strategies.PLACEMENTS
            assert strategies.is_streamed(name) == ("streamed" in name)
            assert compilation in strategies.COMPILATIONS


# The program, with the other process replaced


def run(monkeypatch, *options: str) -> str:
    """Runs the program in this process. Returns what it exits with, or ""."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, options)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        program.main()
    except SystemExit as end:
        return str(end.code)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ""


class Processes:
    """Takes the place of the processes: remembers what it was asked to measure, and fails where it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.measured, self.compiled_in, self.arguments = [], [], {}
        self.failures = {}
        monkeypatch.setattr(processes, "measure_in_fresh_process", self.measure)
        monkeypatch.setattr(processes, "run_in_fresh_process", self.save)

    def measure(self, load, checkpoint, name, arguments, repeats, warmups, picture, timeout_s):
        self.measured.append(name)
        self.compiled_in.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        self.arguments[name] = arguments
        if name in self.failures:
            self.failures[name]()
        Image.new("RGB", (8, 8), (len(self.measured), 0, 0)).save(picture)
        figures = {"load_s": 1.0, "first_call_s": 9.0, "latency_s": 2.0, "footprint_gb": 0.1, "host_peak_gb": 0.5}
        times = {"latencies_s": (2.0,) * repeats, "repeats": repeats, "warmups": warmups}
        return replace(records.measurement(name, checkpoint), **figures, **times)

    def save(self, function, arguments):
        self.measured.append("save")
        Path(arguments["folder"]).mkdir()
        if "save" in self.failures:
            self.failures["save"]()


@pytest.fixture
def started(monkeypatch, cache) -> Processes:
    return Processes(monkeypatch)


def results(folder: Path) -> dict[str, records.Measurement]:
    """The rows of the one JSON file in `folder`."""
    (file,) = folder.glob("*.json")
    return {row.name: row for row in records.load_measurements(file)}


def out_of_memory():
    raise TutorialError("The accelerator is out of memory: use less.")


def test_a_failure_is_a_row_and_the_others_go_on(checkpoint, started, monkeypatch, tmp_path, capsys):
    started.failures = {"bf16, resident, eager": out_of_memory, "save": out_of_memory}
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "eager")
    assert run(monkeypatch, *options) == "4 of 6 combinations could not be measured: the table says why."
    rows = results(tmp_path / "r")
    assert list(rows) == [name for name in program.SEARCHED if "eager" in name]
    failed = {name for name, row in rows.items() if row.failure == "The accelerator is out of memory: use less."}
    assert failed == {name for name in rows if name.startswith(("bf16", "saved"))}
    assert started.measured.count("save") == 1  # not once for each combination
    assert list((tmp_path / "cache" / "saved-nf4").iterdir()) == []
    printed = capsys.readouterr().out
    assert printed.count("out of memory") == len(failed) and "nf4, resident, eager" in printed
    assert (tmp_path / "r").joinpath(next((tmp_path / "r").glob("*.json")).with_suffix(".png")).exists()

    # The same command tries again what failed, and nothing else.
    started.failures, started.measured = {}, []
    assert run(monkeypatch, *options) == ""
    assert set(started.measured) == {"save", *failed}
    assert all(row.failure is None for row in results(tmp_path / "r").values())
    distances = {name: row.distance for name, row in results(tmp_path / "r").items()}
    assert distances["bf16, resident, eager"] == 0 and distances["saved nf4, leaf group offload, eager"] > 0


def test_a_whole_name_is_that_combination_alone(checkpoint, started, monkeypatch, tmp_path):
    """Though others contain it: saved nf4 begins with another word."""
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    own = "bf16, streamed, 0.5 GB, eager"
    assert run(monkeypatch, *options, "nf4, resident, regional compile", "recipe 1", own, own) == ""
    assert list(results(tmp_path / "r")) == ["nf4, resident, regional compile", "recipe 1", own]


def test_a_warm_cache_is_that_of_the_first_of_two_processes(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "nf4, resident")
    assert run(monkeypatch, *options, "--warm-cache") == ""
    first, second = started.compiled_in[::2], started.compiled_in[1::2]
    assert first == second and len(set(first)) == len(first) == 4
    (file,) = (tmp_path / "r").glob("*.json")
    assert "_warm-cache_" in file.name
    started.compiled_in.clear()
    assert run(monkeypatch, *options) == ""
    assert len(set(started.compiled_in)) == len(started.compiled_in) == 4
    assert len(list((tmp_path / "r").glob("*.json"))) == 2


def test_what_was_measured_is_not_measured_again(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--height", "30")
    assert run(monkeypatch, *options, "--only", "bf16, resident") == ""
    assert run(monkeypatch, *options, "--only", "bf16") == ""
    assert len(started.measured) == len(set(started.measured)) == 4
    before = (tmp_path / "r").joinpath(*results(tmp_path / "r")).parent, results(tmp_path / "r")

    for other in (["--steps", "7"], ["--prompt", "a fox"], ["--repeats", "2"], ["--warmups", "1"], ["--width", "64"]):
        sentence = run(monkeypatch, *options, "--only", "bf16", *other)
        assert "another" in sentence and "--again" in sentence and "\n" not in sentence
    assert "another height (30, now None)" in run(monkeypatch, *options[:4], "--only", "bf16")
    assert "another" in run(monkeypatch, *options, "--only", "recipe 1", "--steps", "7", "--again")  # would mix
    assert results(tmp_path / "r") == before[1] and len(started.measured) == 4

    assert run(monkeypatch, *options, "--only", "bf16, resident, eager", "--again") == ""
    assert started.measured[4:] == ["bf16, resident, eager"] and len(results(tmp_path / "r")) == 4
    assert run(monkeypatch, *options, "--only", "bf16", "--again", "--steps", "7") == ""
    assert {row.steps for row in results(tmp_path / "r").values()} == {7}


def test_streamed_within_any_number_of_gb_that_is_named(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--height", "32", "--only")
    other = "saved nf4, streamed, 5.5 GB, regional compile"
    assert run(monkeypatch, *options, other, "streamed, 4 GB") == ""
    assert started.measured == ["save", "saved nf4, streamed, 4 GB, regional compile", other]
    call = started.arguments[other]["call"]
    assert (call["height"], call["prompt"]) == (32, program.PROMPT)
    assert "No combination contains streamed, 5.5 GB" in run(monkeypatch, *options, "streamed, 5.5 GB")


def test_any_combination_can_be_named(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    assert run(monkeypatch, *options, "saved nf4, resident, eager") == ""
    assert started.measured == ["save", "saved nf4, resident, eager"]
    for name in ("saved nf4, residing, eager", "saved nf4, eager", "int8, resident, eager", "saved nf4, , eager"):
        assert "No combination contains" in run(monkeypatch, *options, name)


def test_fp8_and_caches_are_measured_by_their_whole_name(checkpoint, started, monkeypatch, tmp_path):
    """What most cards cannot do is no failure of those who asked for something else."""
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    assert run(monkeypatch, *options, "resident", "streamed, 8 GB") == ""
    others = [name for name in started.measured if "fp8" in name or "cache" in name]
    assert others == [] and "nf4, resident, full compile" in started.measured
    peers = ["bf16, resident, eager, first block cache 0.1", "fp8, resident, regional compile", "fp8, resident, eager"]
    assert run(monkeypatch, *options, *peers) == ""
    assert sorted(started.measured[-3:]) == sorted(peers)
    distances = {name: row.distance for name, row in results(tmp_path / "r").items()}
    assert all(distances[name] > 0 for name in peers) and distances["bf16, resident, eager"] == 0


def test_a_cached_row_without_a_compiler(checkpoint, started, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_backend, "check_compiler", mock.Mock(side_effect=TutorialError("There is none.")))
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    assert run(monkeypatch, *options, "bf16, resident, eager, first block cache 0.1") == ""
    assert "1 of 1" in run(monkeypatch, *options, "bf16, resident, compiled inside, first block cache 0.1")


def test_a_row_is_compared_when_the_first_combination_comes_later(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    assert run(monkeypatch, *options, "fp8, resident, eager") == ""
    assert results(tmp_path / "r")["fp8, resident, eager"].distance is None
    assert run(monkeypatch, *options, "bf16, resident, eager") == ""
    distances = {name: row.distance for name, row in results(tmp_path / "r").items()}
    assert distances["bf16, resident, eager"] == 0 and distances["fp8, resident, eager"] > 0


def test_folders_of_the_same_name_have_files_of_their_own(checkpoint, started, monkeypatch, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "sd3").symlink_to(checkpoint("sd3" if parent == "a" else "sdxl"))
        options = ("--checkpoint", tmp_path / parent / "sd3", "--results", tmp_path / "r")
        assert run(monkeypatch, *options, "--only", "bf16, resident, eager") == ""
    assert len(list((tmp_path / "r").glob("*.json"))) == 2


@pytest.mark.parametrize("stop", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("at", ["save", "saved nf4, leaf group offload, eager"])
def test_a_stop_keeps_what_was_measured(stop, at, checkpoint, started, monkeypatch, tmp_path):
    started.failures = {at: lambda: (os.kill(os.getpid(), getattr(signal, stop)), time.sleep(5))}
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "eager")
    assert "Stopped" in run(monkeypatch, *options)
    assert list(results(tmp_path / "r")) == [
        "bf16, resident, eager",
        "nf4, resident, eager",
        "nf4, model offload, eager",
    ]
    assert len(list((tmp_path / "cache" / "saved-nf4").iterdir())) == (0 if at == "save" else 1)
    started.failures, started.measured = {}, []
    assert run(monkeypatch, *options) == ""
    assert ("save" in started.measured) == (at == "save")
    assert len(results(tmp_path / "r")) == 6


def test_half_saved_weights_are_never_used(checkpoint, started, tmp_path, cache):
    model = models.find_model(str(checkpoint("sd3")))
    folder = Path(program.ensure_saved(model)[0])
    assert program.ensure_saved(model) == (str(folder), "") and started.measured == ["save"]
    part = folder.rename(folder.with_name(folder.name + ".part"))  # as kill -9 leaves it
    (part / "half").touch()
    assert program.ensure_saved(model) == (str(folder), "") and started.measured == ["save", "save"]
    assert not (folder / "half").exists() and not part.exists()


def test_disk_that_is_too_small(checkpoint, started, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: usage(1, 1, 0))
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "leaf group offload, eager")
    assert "1 of 1 combinations could not be measured" in run(monkeypatch, *options)  # so a script can tell
    (row,) = results(tmp_path / "r").values()
    assert (
        re.search(r"needs \d\.\d MB of disk .* has 0 bytes free: free some space", row.failure)
        and started.measured == []
    )


def test_disk_that_fills(checkpoint, started, monkeypatch, tmp_path, capsys):  # capsys: output to no file
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only")
    assert run(monkeypatch, *options, "bf16, resident, eager") == ""
    before = results(tmp_path / "r")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # each file ends there with an error, as on a full disk
    try:
        sentence = run(monkeypatch, *options, "eager")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (the system limits the size of files)" in sentence and "\n" not in sentence
    kept = results(tmp_path / "r")
    measured = [name for name in started.measured if name != "save"]
    assert before.items() <= kept.items() and measured == [*kept, measured[-1]]
    # What could not be written is not lost.
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[{")]
    (lost,) = json.loads(printed)
    assert lost["name"] == measured[-1] and lost["latency_s"] == 2.0
    assert {file.suffix for file in (tmp_path / "r").iterdir()} == {".json", ".png"}


def test_earlier_picture_is_not_compared(checkpoint, started, monkeypatch, tmp_path):
    """The other process could not write one, or failed: there is no distance."""
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "bf16, resident, eager")
    assert run(monkeypatch, *options) == ""
    monkeypatch.setattr(Image.Image, "save", lambda *arguments, **settings: None)
    assert run(monkeypatch, *options, "--again") == ""
    (row,) = results(tmp_path / "r").values()
    assert row.distance is None


# Checks before the work


@pytest.mark.parametrize("broken", ["--results", "TUTORIAL_CACHE"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_folder_that_cannot_be_written(number, broken, checkpoint, started, monkeypatch, tmp_path):
    place, temporary_file = tmp_path / "broken", tempfile.TemporaryFile

    def refuse(dir=None, **settings):
        if place == dir:
            raise OSError(number, os.strerror(number), str(dir))
        return temporary_file(dir=dir, **settings)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    if broken == "TUTORIAL_CACHE":
        monkeypatch.setenv(broken, str(place))
    results = place if broken == "--results" else tmp_path
    sentence = run(monkeypatch, "--checkpoint", checkpoint("sd3"), "--results", results)
    said = {errno.EROFS: "file system is read-only", errno.ENOSPC: "disk is full", errno.EACCES: "no permission"}
    assert f"{place} cannot be written (" in sentence and said[number] in sentence and broken in sentence
    assert ("free some space" in sentence) == (number == errno.ENOSPC) and started.measured == []


def test_cut_weights_are_named_and_no_old_row_is_shown(checkpoint, started, monkeypatch, tmp_path, capsys):
    shutil.copytree(checkpoint("sd3"), tmp_path / "sd3")
    options = ("--checkpoint", tmp_path / "sd3", "--results", tmp_path / "r", "--only", "bf16, resident, eager")
    assert run(monkeypatch, *options) == ""
    capsys.readouterr()
    weights = tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    sentence = run(monkeypatch, *options)
    assert "(transformer/diffusion_pytorch_model.safetensors is cut short): restore it" in sentence
    assert "bf16" not in capsys.readouterr().out and len(started.measured) == 1


def test_deleted_pocket_checkpoint(pocket, started, monkeypatch, tmp_path):
    shutil.rmtree(pocket)
    sentence = run(monkeypatch, "--checkpoint", "pocket-flux", "--results", tmp_path / "r")
    assert "git checkout -- checkpoints/pocket-flux" in sentence and started.measured == []


def test_no_compiler(checkpoint, started, monkeypatch, tmp_path):
    """What needs one says so, in the lessons' sentence; the others are measured."""
    monkeypatch.setattr(cpu_backend, "has_gpu", lambda: False)
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "bf16, resident", "recipe 1")
    # monkeypatch would leave the setting deleted.
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        sentence = run(monkeypatch, *options)
    assert sentence == "3 of 4 combinations could not be measured: the table says why."
    assert started.measured == ["bf16, resident, eager"]
    failures = [row.failure for row in results(tmp_path / "r").values() if row.failure]
    assert len(failures) == 3 and all("no-such-compiler was not found: install one" in text for text in failures)


def test_same_output_of_failures_is_shown_once(checkpoint, started, monkeypatch, tmp_path, capsys):
    def fail():
        print("Traceback of many lines", file=sys.stderr)
        raise TutorialError(f"{started.measured[-1]} failed in its own process: KeyError: 'a'; see the output above.")

    started.failures = {"bf16, resident, eager": fail, "nf4, resident, eager": fail}
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", "--only", "resident, eager")
    assert "2 of 2" in run(monkeypatch, *options)
    printed = capsys.readouterr()
    assert printed.err.count("Traceback of many lines") == 1
    assert printed.out.count("failed: failed in its own process: KeyError") == 2  # the name is not repeated


# Bad input


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (None, "model_index.json is missing"),
        ("{", "model_index.json cannot be read"),
        ("{}", "names no class"),
        ('{"_class_name": "NoSuchPipeline"}', "does not have"),
        ('{"_class_name": "StableVideoDiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]}', "takes no prompt"),
        ('{"_class_name": "WanImageToVideoPipeline"}', r"more than a prompt \(image\)"),
        ('{"_class_name": "SanaPipeline", "transformer": [null, null]}', "no transformer and no UNet"),
        (
            '{"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}',
            "transformer/ is missing",
        ),
    ],
)
def test_folder_that_is_no_such_checkpoint(index, expected, started, monkeypatch, tmp_path):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    sentence = run(monkeypatch, "--checkpoint", tmp_path, "--results", tmp_path / "r")
    assert re.search(expected, sentence) and "\n" not in sentence


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--checkpoint", "/no/such/folder"], "There is no folder"),
        (["--only", "nothing"], "No combination contains nothing"),
        (["--frames", "5"], "does not take num_frames"),
        (["--results", __file__], "cannot be written"),
    ],
)
def test_options_that_cannot_be(options, expected, checkpoint, started, monkeypatch, tmp_path):
    sentence = run(monkeypatch, "--checkpoint", checkpoint("sd3"), "--results", tmp_path / "r", *options)
    assert expected in sentence and "\n" not in sentence and started.measured == []


@pytest.mark.parametrize("options", [["--steps", "0"], ["--repeats", "0"], ["--warmups", "-1"], ["--height", "x"]])
def test_numbers_that_cannot_be(options, monkeypatch, capsys):
    assert run(monkeypatch, *options) == "2"
    assert "is not a whole number from" in capsys.readouterr().err


def test_results_that_cannot_be_read(checkpoint, started, monkeypatch, tmp_path):
    options = ("--checkpoint", checkpoint("sd3"), "--results", tmp_path, "--only", "bf16, resident, eager")
    assert run(monkeypatch, *options) == ""
    (file,) = tmp_path.glob("*.json")
    for text in ("", "[1]", "{}x", '["a"]'):
        file.write_text(text)
        assert "cannot be read" in run(monkeypatch, *options)


# The program, for true


def test_killed_and_resumed(checkpoint, cache, monkeypatch, tmp_path, capsys):
    options = [
        "--checkpoint",
        str(checkpoint("ltx")),
        "--results",
        str(tmp_path / "r"),
        "--repeats",
        "1",
        "--steps",
        "2",
    ]
    options += ["--height", "32", "--width", "32", "--frames", "9"]
    command = [sys.executable, "-m", "benchmarks", *options, "--only", "resident, eager"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    # After the first row, in the middle of the second combination.
    while "bf16, resident, eager " not in (printed := process.stdout.readline()):
        assert printed, "the program ended early"
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children
    process.kill()
    process.wait()
    process.stdout.close()
    assert psutil.wait_procs(children, timeout=4)[1] == []  # by itself it would take longer
    assert list(results(tmp_path / "r")) == ["bf16, resident, eager"]

    capsys.readouterr()
    tight, too_tight = (f"saved nf4, streamed, {limit} GB, eager" for limit in (0.001, 0.0001))
    chosen = ["--only", "bf16, resident, eager", "block group offload, eager", tight, too_tight]
    sentence = run(monkeypatch, *options, *chosen)
    first, second, *streamed = results(tmp_path / "r").values()
    if devices.accelerator().type == "cpu":  # a real card has no pages so small
        assert (streamed[0].name, streamed[0].failure, streamed[0].distance) == (tight, None, second.distance)
    assert sentence.startswith(f"{sum(row.failure is not None for row in streamed)} of 4")
    assert streamed[1].name == too_tight and streamed[1].failure.endswith("give more.")
    assert (second.name, second.failure) == ("saved nf4, block group offload, eager", None)
    assert (second.height, second.width, second.frames, second.steps) == (32, 32, 9, 2)
    assert first.distance == 0 and 0 < second.distance < 25 and second.spread_s == 0
    values = json.loads(next((tmp_path / "r").glob("*.json")).read_text())[1]
    of_cards = {"load_peak_gb", "run_peak_gb", "reserved_gb"}
    optional = {"driver", "failure", "source", "skipped"} | (of_cards if devices.accelerator().type == "cpu" else set())
    assert {name for name, value in values.items() if value is None} <= optional
    assert values["call"]["prompt"] == program.PROMPT

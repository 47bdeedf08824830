"""programs/save_nf4.py: what it writes loads as what is quantized at load, and nothing half-written is ever loaded."""

import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import save_nf4
import tiny_pipelines
import torch
from conftest import build_pipeline
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionXLControlNetPipeline
from safetensors import SafetensorError

from benchmarks import strategies
from helpers import checks, devices, models
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

POCKET = PACKAGE_ROOT / "checkpoints" / "pocket-flux"


def save(source, out, *options):
    save_nf4.main([str(source), str(out), *options])


def refusal(*arguments):
    """The sentence that the program ends with."""
    with pytest.raises(SystemExit) as stopped:
        save(*arguments)
    return str(stopped.value)


def tensors(pipeline):
    """All that is saved of the models of a pipeline, by component and name."""
    parts = devices.component_modules(pipeline)
    return {f"{part}/{name}": tensor for part in parts for name, tensor in parts[part].state_dict().items()}


def check_same_weights(source, out):
    assert checks.find_fault(out) is None
    expected = strategies.quantize_at_load(models.find_model(str(source)))
    loaded = DiffusionPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert loaded.components.keys() == expected.components.keys()
    assert [type(part) for part in loaded.components.values()] == [type(part) for part in expected.components.values()]
    expected, loaded = tensors(expected), tensors(loaded)
    assert loaded.keys() == expected.keys() and any("quant_state" in name for name in loaded)
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)] == []


def without_text_encoders(folder):
    pipeline = build_pipeline()
    pipeline.register_modules(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    pipeline.save_pretrained(folder)


def with_controlnet(folder):
    parts = tiny_pipelines.build("sdxl").components
    net = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3).to(torch.bfloat16)
    StableDiffusionXLControlNetPipeline(**parts, controlnet=net).save_pretrained(folder)


def fp16_but_the_vae(folder):
    tiny_pipelines.build("sdxl").save_pretrained(folder, variant="fp16")
    vae = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.safetensors"))


CHECKPOINTS = {
    "two denoisers": lambda folder: tiny_pipelines.save("wan22", folder),
    "three text encoders": lambda folder: tiny_pipelines.save("sd3", folder),
    "sound": lambda folder: tiny_pipelines.save("ltx2", folder),
    "pocket FLUX": lambda folder: shutil.copytree(POCKET, folder, dirs_exist_ok=True),
    "no text encoders": without_text_encoders,
    "ControlNet": with_controlnet,
    "fp16": fp16_but_the_vae,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_saved_is_what_quantizing_at_load_gives(kind, tmp_path):
    source = tmp_path / "source"
    CHECKPOINTS[kind](source)
    save(source, tmp_path / "out")
    check_same_weights(source, tmp_path / "out")


def test_older_files_of_weights_are_read_too(tmp_path):
    source, older = tiny_pipelines.save("sdxl", tmp_path / "source"), tmp_path / "older"
    shutil.copytree(source, older)
    for file in older.glob("*/*.safetensors"):
        pipeline_part = DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16).components[file.parent.name]
        torch.save(pipeline_part.state_dict(), file.with_name(file.name.replace("model.safetensors", "model.bin")))
        file.unlink()
    for file in older.glob("text_encoder*/model.bin"):
        file.rename(file.with_name("pytorch_model.bin"))
    save(older, tmp_path / "out")
    check_same_weights(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*.bin"))


def test_it_says_what_it_took(tmp_path, capsys):
    source = tiny_pipelines.save("wan22", tmp_path / "source")
    save(source, tmp_path / "out", "--device", "cpu")
    *lines, last = capsys.readouterr().out.splitlines()
    sizes = models.find_model(str(source)).sizes
    assert {line.split()[0]: line.split()[-1] for line in lines} == {
        name: "bfloat16" if name == "vae" else "nf4" for name in sizes
    }
    for line in lines:
        name, before, unit, _, after, _, _ = line.split()
        assert float(before) == pytest.approx(sizes[name] / 1e6, abs=0.051) and unit == "MB"
        size = sum(file.stat().st_size for file in (tmp_path / "out" / name).iterdir())
        assert float(after) == pytest.approx(size / 1e6, abs=0.051)
    assert last.startswith(f"{tmp_path / 'out'} is complete") and "in host memory" in last and "card" not in last


@pytest.mark.parametrize("error", [KeyboardInterrupt, SafetensorError("No space left on device"), OSError(28, "full")])
def test_an_unfinished_folder_is_no_checkpoint_and_is_written_anew(error, tmp_path, monkeypatch):
    source, out = tiny_pipelines.save("sd3", tmp_path / "source"), tmp_path / "out"
    save_component, names = save_nf4.save_component, []

    def fail_at_the_end(name, *rest):
        save_component(name, *rest)
        names.append(name)
        if len(names) == len(models.read_components(str(source))):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(save_nf4, "save_component", fail_at_the_end)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            save(source, out)
    if error is not KeyboardInterrupt:
        assert str(stopped.value).startswith(f"{out} could not be completed (")
    with pytest.raises(TutorialError, match="model_index.json is missing"):
        models.find_model(str(out))
    (out / "vae" / "left over").touch()
    save(source, out)
    check_same_weights(source, out)
    assert not (out / "vae" / "left over").exists() and not (out / save_nf4.UNFINISHED).exists()


def test_one_component_at_a_time_is_alive(tmp_path, monkeypatch):
    source = tiny_pipelines.save("wan22", tmp_path / "source")
    save_component, alive = save_nf4.save_component, []
    before = devices.free_memory() and devices.weights_alive_gb()
    monkeypatch.setattr(
        save_nf4,
        "save_component",
        lambda *arguments: (alive.append(devices.weights_alive_gb()), save_component(*arguments)),
    )
    save(source, tmp_path / "out")
    assert len(alive) == 6 and max(alive) <= before


def test_no_half_checkpoint_stands_for_a_whole_one(tmp_path):
    source, out = tiny_pipelines.save("sdxl", tmp_path / "source"), tmp_path / "out"
    save(source, out)
    assert refusal(source, out) == f"{out} is not empty: delete it, or give another folder as OUT."
    assert refusal(out, tmp_path / "again") == f"{out} is quantized already: draw with it as it is."
    assert not (tmp_path / "again").exists()


def test_checkpoints_that_cannot_be(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "model_index.json is missing" in refusal(tmp_path, out)
    assert refusal(tmp_path / "nothing", out).startswith("There is no folder")
    source = tiny_pipelines.save("sdxl", tmp_path / "source")
    (tmp_path / "file").touch()
    assert "a file stands where a folder must be" in refusal(source, tmp_path / "file")
    assert not torch.cuda.is_available() and "no CUDA card" in refusal(source, out, "--device", "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1e5))
        assert "nf4 weights needs" in refusal(source, out)
    (source / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "is cut short" in refusal(source, out)
    assert not out.exists()


def test_a_repository_is_checked_before_it_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not complete in the local cache" in refusal("nobody/has-this", tmp_path / "out")


def test_ctrl_c_is_one_word(tmp_path):
    program = [sys.executable, str(PACKAGE_ROOT / "programs" / "save_nf4.py"), str(POCKET), str(tmp_path / "out")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "\nStopped.\n") and process.returncode == 130

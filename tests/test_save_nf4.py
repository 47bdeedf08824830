"""programs/save_nf4.py: what it writes loads as what is quantized at load, and nothing half-written is ever loaded."""

import errno
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import save_nf4
import tiny_pipelines
import torch
from conftest import build_pipeline
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    HunyuanDiT2DModel,
    StableDiffusionXLControlNetPipeline,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

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


def test_no_file_ends_within_an_nf4_weight(tmp_path):
    """diffusers does not load a weight whose quant_state is in the next file, and fills each file up."""
    pipeline = strategies.quantize_at_load(models.find_model(str(POCKET)))
    parted, whole = [], []
    for smallest in range(100_000, 200_000, 9_000):
        for name in ("transformer", "text_encoder_2"):
            module, folder = getattr(pipeline, name), tmp_path / f"{name}-{smallest}"
            module.save_pretrained(folder, max_shard_size=models.find_file_size(module, smallest=smallest))
            loaded = type(module).from_pretrained(folder, dtype=torch.bfloat16).state_dict()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in module.state_dict().items())
            whole.append(len(list(folder.glob("*.safetensors"))))
        pipeline.transformer.save_pretrained(tmp_path / f"{smallest}", max_shard_size=smallest)
        try:
            type(pipeline.transformer).from_pretrained(tmp_path / f"{smallest}", dtype=torch.bfloat16)
        except ValueError as error:
            parted.append(str(error))
    assert min(whole) > 2 and parted and all("does not contain `bitsandbytes__*`" in text for text in parted)


def without_text_encoder(folder):
    pipeline = tiny_pipelines.build("pixart")
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(folder)


def with_controlnet(folder, variant=None):
    parts = tiny_pipelines.build("sdxl").components
    net = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3).to(torch.bfloat16)
    StableDiffusionXLControlNetPipeline(**parts, controlnet=net).save_pretrained(folder, variant=variant)


def fp16_but_the_vae(folder):
    with_controlnet(folder, variant="fp16")
    vae = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.safetensors"))


def no_safetensors(folder):
    for file in tiny_pipelines.save("pixart", folder).glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.name.startswith("model") else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


CHECKPOINTS = {
    "FLUX": lambda folder: build_pipeline().save_pretrained(folder),
    "two denoisers": lambda folder: tiny_pipelines.save("wan22", folder),
    "no text encoder": without_text_encoder,
    "ControlNet, fp16": fp16_but_the_vae,
    "no safetensors": no_safetensors,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_saved_is_what_quantizing_at_load_gives(kind, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    CHECKPOINTS[kind](source)
    save(source, out)
    check_same_weights(source, out)
    assert {file.suffix for file in out.glob("*/*model*") if file.suffix != ".json"} == {".safetensors"}


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


@pytest.fixture
def pixart(tmp_path):
    return tiny_pipelines.save("pixart", tmp_path / "source")


def test_an_unfinished_folder_is_no_checkpoint_and_is_written_anew(pixart, tmp_path, monkeypatch):
    out, save_component, names = tmp_path / "out", save_nf4.save_component, []

    def stop_at_the_end(name, *rest):
        save_component(name, *rest)
        names.append(name)
        if len(names) == len(models.read_components(str(pixart))):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(save_nf4, "save_component", stop_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            save(pixart, out)
    with pytest.raises(TutorialError, match="model_index.json is missing"):
        models.find_model(str(out))
    (out / "vae" / "left over").touch()
    save(pixart, out)
    check_same_weights(pixart, out)
    assert not (out / "vae" / "left over").exists() and not (out / save_nf4.UNFINISHED).exists()


FULL = "No space left on device"


@pytest.mark.parametrize("error", [SafetensorError(FULL), OSError(errno.ENOSPC, FULL)])
def test_a_disk_that_fills(error, pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "save_pretrained", mock.Mock(side_effect=error))
    sentence = refusal(pixart, tmp_path / "out")
    assert sentence.startswith(f"{tmp_path / 'out'} cannot be written (") and " free some space " in sentence
    assert "No space left" in sentence or "the disk is full" in sentence
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_an_error_of_a_library_is_not_taken_for_one_of_the_disk(pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(save_nf4, "save_component", mock.Mock(side_effect=OSError("no file named model.safetensors")))
    with pytest.raises(OSError, match="no file named"):
        save(pixart, tmp_path / "out")


def test_a_card_that_runs_out_of_memory(pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(save_nf4, "save_component", mock.Mock(side_effect=torch.OutOfMemoryError("a screen full")))
    assert refusal(pixart, tmp_path / "out").endswith("quantize with --device cpu.")


def test_one_component_at_a_time_is_alive(pixart, tmp_path, monkeypatch):
    save_component, alive = save_nf4.save_component, []
    before = devices.free_memory() and devices.weights_alive_gb()
    monkeypatch.setattr(
        save_nf4,
        "save_component",
        lambda *arguments: (alive.append(devices.weights_alive_gb()), save_component(*arguments)),
    )
    save(pixart, tmp_path / "out")
    assert len(alive) == 5 and max(alive) <= before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what lies in memory")
def test_on_the_cpu_no_file_of_weights_stays_in_memory(tmp_path, monkeypatch):
    """One of diffusers would as long as one of its tensors is used, so all files at once, beside what is saved."""
    source, mapped = tmp_path / "qwen", []
    pipeline = tiny_pipelines.build("flux2")
    pipeline.save_pretrained(source, max_shard_size="50KB")
    find_file_size, folder = models.find_file_size, str(source / "transformer")
    assert len(list(Path(folder).glob("*.safetensors"))) > 3

    def note(component):
        mapped.append(folder in Path("/proc/self/maps").read_text())
        return find_file_size(component)

    monkeypatch.setattr(models, "find_file_size", note)
    save(source, tmp_path / "out", "--device", "cpu")
    assert len(mapped) == 3 and not any(mapped)


def test_what_is_there_is_not_overwritten_and_not_quantized_again(pixart, tmp_path):
    out = tmp_path / "out"
    save(pixart, out)
    assert refusal(pixart, out) == f"{out} is not empty: delete it, or give another folder as OUT."
    assert refusal(out, tmp_path / "again") == f"{out} is quantized already: draw with it as it is."
    assert not (tmp_path / "again").exists()


def test_checkpoints_that_cannot_be(pixart, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "model_index.json is missing" in refusal(tmp_path, out)
    assert refusal(tmp_path / "nothing", out).startswith("There is no folder")
    (tmp_path / "file").touch()
    assert "a file stands where a folder must be" in refusal(pixart, tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA card" in refusal(pixart, out, "--device", "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1e5))
        assert "nf4 weights needs" in refusal(pixart, out)
    (pixart / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "is cut short" in refusal(pixart, out)
    assert not out.exists()


def test_layers_that_are_not_called_stay_as_they_are(tmp_path):
    """HunyuanDiT gives the weights of its pooler to `F.multi_head_attention_forward`, which knows nothing of nf4."""
    widths = dict.fromkeys(
        ("hidden_size", "pooled_projection_dim", "cross_attention_dim", "cross_attention_dim_t5"), 64
    )
    heads = {"num_attention_heads": 2, "attention_head_dim": 32, "sample_size": 16, "patch_size": 2, "in_channels": 4}
    HunyuanDiT2DModel(**widths, **heads, num_layers=2, text_len=8, text_len_t5=8).save_pretrained(
        tmp_path / "transformer"
    )
    model = SimpleNamespace(path=tmp_path, component_class=lambda name: HunyuanDiT2DModel, quantized=("transformer",))
    save_nf4.save_component("transformer", model, tmp_path / "out", "cpu")
    saved = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    quantized = [name for name in saved if "quant_state" in name]
    assert quantized and not any("pooler" in name for name in quantized)


def test_what_draw_refuses_is_saved_for_other_programs_and_it_says_so(pixart, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "find_more", lambda path: "A PixArtEditPipeline draws nothing")
    save(pixart, tmp_path / "out")
    assert "A PixArtEditPipeline draws nothing: what is saved is for a program of your own" in capsys.readouterr().out


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

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw, message_of
from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from safetensors.torch import load_file

from helpers import checkpoints, checks
from helpers.checkpoints import get_checkpoint


def test_pocket_is_the_default(pocket):
    checkpoint = get_checkpoint("flux")
    assert (checkpoint.size, checkpoint.path) == ("pocket", str(pocket))
    assert (checkpoint.height, checkpoint.width, checkpoint.max_sequence_length) == (128, 128, 32)
    assert checkpoint.num_inference_steps <= 20
    assert checkpoint.prompt == checkpoint.prompts[0] == "cat face on a yellow background"


def test_pocket_is_found_above_the_current_folder(pocket, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "PACKAGE_ROOT", tmp_path / "elsewhere")
    notebooks = tmp_path / "repository" / "notebooks"
    notebooks.mkdir()
    monkeypatch.chdir(notebooks)
    assert get_checkpoint("flux").path == str(pocket)


def test_call_arguments_are_the_pipelines_own(bf16_pipeline):
    checkpoint = checkpoints.CHECKPOINTS["flux", "pocket"]
    arguments = checkpoint.call_arguments
    assert arguments["guidance_scale"] == 3.5
    assert "num_frames" not in arguments and "negative_prompt" not in arguments
    picture = draw(bf16_pipeline, **{**arguments, "num_inference_steps": 1, "max_sequence_length": 16})
    assert picture.shape[:2] == (checkpoint.height, checkpoint.width)


def test_call_arguments_of_a_video():
    video = checkpoints.CHECKPOINTS["wan", "pocket"]
    assert video.call_arguments == {
        "prompt": "red apple moves right on a blue background",
        "negative_prompt": "blurry, static, noisy, dim",
        "height": 96,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
    }


def test_every_model_comes_in_every_size():
    for (model, size), checkpoint in checkpoints.CHECKPOINTS.items():
        assert (checkpoint.model, checkpoint.size) == (model, size)
        assert {(model, other) for other in checkpoints.SIZES} <= set(checkpoints.CHECKPOINTS)
    wan = checkpoints.CHECKPOINTS["wan", "random"]
    assert wan.path == "random-wan" and (wan.height, wan.width, wan.num_frames) == (480, 832, 81)


def test_path_of_this_machine_stays_out_of_notebooks(pocket):
    assert str(pocket.parent) not in repr(get_checkpoint("flux"))


def test_unknown_size(pocket, monkeypatch):
    monkeypatch.setenv("TUTORIAL_MODELS", "tiny")
    text = message_of(get_checkpoint, "flux")
    assert "'tiny'" in text and "pocket or full or random" in text


def test_unknown_model(pocket):
    text = message_of(get_checkpoint, "sdxl")
    assert "'sdxl'" in text and "'flux' or 'wan'" in text


def test_missing_checkpoint(pocket):
    shutil.rmtree(pocket)
    text = message_of(get_checkpoint, "flux")
    assert "missing" in text and "git checkout -- checkpoints/pocket-flux" in text
    assert "git checkout -- checkpoints/pocket-wan" in message_of(get_checkpoint, "wan")


def remove(file: str):
    def damage(folder: Path) -> None:
        target = folder / file
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def cut(file: str, size: int):
    def damage(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return damage


def write(file: str, text: str):
    def damage(folder: Path) -> None:
        (folder / file).write_text(text)

    return damage


def empty_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(".bin").touch()


def leave_a_pointer(folder: Path) -> None:
    # What `git clone` leaves of a large file without Git LFS; read as a header length it is astronomic.
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 999400\n")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "text_encoder_2/model.safetensors.index.json").write_text(json.dumps(index))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FAULTS = [
    (remove("model_index.json"), "model_index.json is missing"),
    (cut("model_index.json", 40), "model_index.json cannot be read"),
    (remove("vae"), "vae/ is missing"),
    (remove("transformer/config.json"), "transformer/config.json is missing"),
    (remove("scheduler/scheduler_config.json"), "scheduler/scheduler_config.json is missing"),
    (remove("tokenizer_2/tokenizer.json"), "tokenizer_2/tokenizer.json is missing"),
    (remove(WEIGHTS), "transformer/*.safetensors is missing"),
    (cut(WEIGHTS, -1), f"{WEIGHTS} is cut short"),  # one byte
    (cut(WEIGHTS, 100), f"{WEIGHTS} is cut short"),  # inside the header
    (cut(WEIGHTS, 0), f"{WEIGHTS} is cut short"),
    (leave_a_pointer, f"{WEIGHTS} is cut short"),
    (lose_a_shard, "text_encoder_2/model-00001-of-00002.safetensors is missing"),
    (cut("transformer/config.json", 30), "transformer/config.json cannot be read"),
    (cut("transformer/config.json", 0), "transformer/config.json cannot be read"),
    (cut("scheduler/scheduler_config.json", 0), "scheduler/scheduler_config.json cannot be read"),
    (cut("tokenizer/tokenizer_config.json", 5), "tokenizer/tokenizer_config.json cannot be read"),
    (cut("tokenizer/tokenizer.json", 400), "tokenizer/tokenizer.json cannot be read"),
    (cut("tokenizer/tokenizer.json", 0), "tokenizer/tokenizer.json cannot be read"),
    (write("text_encoder_2/model.safetensors.index.json", '{"weight_'), "model.safetensors.index.json cannot be read"),
    (write("text_encoder_2/model.safetensors.index.json", "{}"), "model.safetensors.index.json cannot be read"),
    (write("model_index.json", "[]"), "model_index.json cannot be read"),
    (empty_bin, "transformer/diffusion_pytorch_model.bin is cut short"),
]


@pytest.mark.parametrize(("damage", "fault"), FAULTS)
def test_incomplete_checkpoint(pocket, damage, fault):
    damage(pocket)
    text = message_of(get_checkpoint, "flux")
    assert fault in text and "git checkout -- checkpoints/pocket-flux" in text


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", WEIGHTS])
def test_a_file_without_read_permission(file, pocket, monkeypatch):
    """As another user than root meets it."""
    opened = Path.open

    def refuse(path, *arguments, **settings):
        if path == pocket / file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: path.open(encoding=encoding).read())
    assert f"({Path(file).name} cannot be read, you have no permission)" in message_of(get_checkpoint, "flux")


def test_bin_weights_are_weights(pocket):
    """diffusers loads them where there is no safetensors file."""
    tensors = load_file(pocket / WEIGHTS)
    (pocket / WEIGHTS).unlink()
    torch.save(tensors, (pocket / WEIGHTS).with_suffix(".bin"))
    assert DiffusionPipeline.from_pretrained(get_checkpoint("flux").path).transformer is not None


def test_checkpoint_of_nf4_weights_is_complete(nf4_pipeline, tmp_path):
    nf4_pipeline.save_pretrained(tmp_path)
    assert checks.find_fault(tmp_path) is None


def test_a_guider_is_a_component_without_weights(pocket):
    """HunyuanVideo 1.5 has one."""
    index = json.loads((pocket / "model_index.json").read_text("utf-8"))
    index["guider"] = ["diffusers", "ClassifierFreeGuidance"]
    (pocket / "model_index.json").write_text(json.dumps(index), "utf-8")
    ClassifierFreeGuidance().save_pretrained(pocket / "guider")
    assert checks.find_fault(pocket) is None


def test_random_checkpoint(pocket, tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_MODELS", "random")
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path / "cache"))
    assert "python -m benchmarks.random_checkpoints flux" in message_of(get_checkpoint, "flux")

    shutil.copytree(pocket, tmp_path / "cache" / "random-flux")
    checkpoint = get_checkpoint("flux")
    assert checkpoint.path == str(tmp_path / "cache" / "random-flux")
    assert (checkpoint.height, checkpoint.num_inference_steps, checkpoint.max_sequence_length) == (1024, 28, 512)

    (tmp_path / "cache" / "random-flux" / WEIGHTS).unlink()
    assert WEIGHTS.split("/")[0] in message_of(get_checkpoint, "flux")


def test_pipeline_loads_from_the_path(pocket):
    assert type(DiffusionPipeline.from_pretrained(get_checkpoint("flux").path)).__name__ == "FluxPipeline"


def test_notebook_shows_the_sentence_alone(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from helpers.errors import TutorialError\nraise TutorialError('Install it.')")
    shown = capsys.readouterr().out
    assert "TutorialError: Install it." in shown and "Traceback" not in shown

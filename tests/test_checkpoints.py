import json
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import draw
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from helpers import checkpoints
from helpers.checkpoints import check_versions, get_checkpoint
from helpers.errors import TutorialError

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("TUTORIAL_MODELS", "TUTORIAL_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pocket(tmp_path, monkeypatch, tiny_checkpoint) -> Path:
    """A copy of the tiny checkpoint where the pocket checkpoint belongs, in a repository of its own."""
    folder = tmp_path / "repository" / "checkpoints" / "pocket-flux"
    shutil.copytree(tiny_checkpoint, folder)
    monkeypatch.setattr(checkpoints, "PACKAGE_ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    return folder


def message_of(function, *arguments) -> str:
    """The text of the TutorialError that the call raises, which must be one sentence."""
    with pytest.raises(TutorialError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text
    return text


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
    (remove("scheduler/scheduler_config.json"), "scheduler/config.json is missing"),
    (remove("tokenizer_2/tokenizer.json"), "tokenizer_2/tokenizer.json is missing"),
    (remove(WEIGHTS), "transformer/*.safetensors is missing"),
    (cut(WEIGHTS, -1), f"{WEIGHTS} is cut short"),  # one byte
    (cut(WEIGHTS, 100), f"{WEIGHTS} is cut short"),  # inside the header
    (cut(WEIGHTS, 0), f"{WEIGHTS} is cut short"),
    (leave_a_pointer, f"{WEIGHTS} is cut short"),
    (lose_a_shard, "text_encoder_2/model-00001-of-00002.safetensors is missing"),
]


@pytest.mark.parametrize(("damage", "fault"), FAULTS, ids=[fault for _, fault in FAULTS])
def test_incomplete_checkpoint(pocket, damage, fault):
    damage(pocket)
    text = message_of(get_checkpoint, "flux")
    assert fault in text and "git checkout -- checkpoints/pocket-flux" in text


def test_checkpoint_of_nf4_weights_is_complete(nf4_pipeline, tmp_path):
    nf4_pipeline.save_pretrained(tmp_path)
    assert checkpoints.find_fault(tmp_path) is None


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


@pytest.fixture
def hub(monkeypatch, pocket):
    """The Hub as get_checkpoint sees it: nothing cached, access granted, 33 GB to download, 100 GB of disk free."""
    monkeypatch.setenv("TUTORIAL_MODELS", "full")
    state = SimpleNamespace(access=Mock(), token="hf_x", free=100e9, cached=None)

    def snapshot_download(repo_id, local_files_only):
        assert local_files_only  # nothing is downloaded here
        if state.cached is None:
            raise LocalEntryNotFoundError("not cached")
        return str(state.cached)

    files = [("transformer/diffusion_pytorch_model.safetensors", 33e9), ("flux1-dev.safetensors", 24e9)]
    siblings = [SimpleNamespace(rfilename=name, size=int(size)) for name, size in files]
    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    monkeypatch.setattr(checkpoints, "auth_check", state.access)
    monkeypatch.setattr(checkpoints, "get_token", lambda: state.token)
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda repo_id, file: None)
    monkeypatch.setattr(checkpoints.HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: SimpleNamespace(free=state.free))
    return state


def response() -> Mock:
    return Mock(headers={}, status_code=401)


def test_full_checkpoint_with_access(hub):
    checkpoint = get_checkpoint("flux")
    assert (checkpoint.path, checkpoint.height, checkpoint.max_sequence_length) == (FLUX, 1024, 512)
    hub.access.assert_called_once_with(FLUX)


def test_full_checkpoint_in_the_cache_needs_no_network(hub, tiny_checkpoint):
    hub.cached = tiny_checkpoint
    hub.access.side_effect = OfflineModeIsEnabled("offline")
    assert get_checkpoint("flux").path == str(tiny_checkpoint)


def test_half_downloaded_checkpoint_is_not_in_the_cache(hub, pocket):
    (pocket / WEIGHTS).unlink()
    hub.cached = pocket
    assert get_checkpoint("flux").path == FLUX


def test_full_without_network(hub):
    # What huggingface_hub lets through when no connection can be made: an error of its HTTP library.
    http_error = next(
        base for base in RepositoryNotFoundError.__mro__ if base.__module__.startswith(("httpx", "requests"))
    )
    for error in (http_error("no route"), ConnectionError("no route")):
        hub.access.side_effect = error
        text = message_of(get_checkpoint, "flux")
        assert "cannot be reached" in text and "check the network" in text


def test_full_in_offline_mode(hub):
    hub.access.side_effect = OfflineModeIsEnabled("offline")
    assert "unset HF_HUB_OFFLINE" in message_of(get_checkpoint, "flux")


def test_full_without_token(hub):
    hub.token = None
    hub.access.side_effect = GatedRepoError("gated", response=response())
    text = message_of(get_checkpoint, "flux")
    assert "hf auth login" in text and f"https://huggingface.co/{FLUX}" in text


def test_full_without_accepted_licence(hub):
    hub.access.side_effect = GatedRepoError("gated", response=response())
    text = message_of(get_checkpoint, "flux")
    assert "licence" in text and f"https://huggingface.co/{FLUX}" in text and "hf auth login" not in text


def test_full_with_an_invalid_token(hub):
    hub.access.side_effect = RepositoryNotFoundError("401", response=response())
    assert "hf auth login" in message_of(get_checkpoint, "flux")


def test_full_without_space(hub):
    hub.free = 32e9
    text = message_of(get_checkpoint, "flux")
    assert "needs 33.0 GB" in text and "32.0 GB free" in text and "HF_HOME" in text


def test_no_space_is_needed_for_what_is_cached(hub, monkeypatch):
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda repo_id, file: "/cache/" + file)
    hub.free = 0
    assert get_checkpoint("flux").path == FLUX


@pytest.fixture
def needs(pocket):
    """Write the dependencies of the package."""

    def write(*dependencies: str) -> None:
        text = f"[project]\nname = 'x'\nversion = '1'\ndependencies = {json.dumps(dependencies)}\n"
        (pocket.parents[1] / "pyproject.toml").write_text(text)

    return write


def test_too_old_a_library(needs, monkeypatch):
    needs("diffusers>=0.40,<0.43")
    monkeypatch.setattr(metadata, "version", lambda name: {"diffusers": "0.39.0"}[name])
    for check in (check_versions, lambda: get_checkpoint("flux")):
        text = message_of(check)
        assert "diffusers 0.39.0 is installed" in text and "diffusers<0.43,>=0.40" in text
        assert "python -m pip install" in text


def test_missing_library(needs, monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    needs("bitsandbytes>=0.50")
    monkeypatch.setattr(metadata, "version", version)
    text = message_of(check_versions)
    assert "bitsandbytes is not installed" in text and 'pip install --upgrade "bitsandbytes>=0.50"' in text


def test_versions_that_fit(needs):
    # Neither one for another Python nor one that a lesson does not compute with counts.
    needs("diffusers>=0.1", "torch>=2", "safetensors>=99; python_version < '3'", "no-such-library>=1")
    check_versions()


def test_versions_of_an_installed_package(monkeypatch, pocket):
    # No pyproject.toml beside the package: its metadata count.
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"helpers": ["lessons"]})
    monkeypatch.setattr(metadata, "requires", lambda name: {"lessons": ["diffusers>=99"]}[name])
    assert "the lessons need diffusers>=99" in message_of(check_versions)


def test_pipeline_loads_from_the_path(pocket):
    assert type(DiffusionPipeline.from_pretrained(get_checkpoint("flux").path)).__name__ == "FluxPipeline"


def test_notebook_shows_the_sentence_alone(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from helpers.errors import TutorialError\nraise TutorialError('Install it.')")
    shown = capsys.readouterr().out
    assert "TutorialError: Install it." in shown and "Traceback" not in shown

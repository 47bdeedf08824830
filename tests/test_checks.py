"""The checks that lessons and benchmark share: the Hub and the versions. Those of files are in test_checkpoints."""

import errno
import json
import re
import shutil
import sys
import time
from importlib import metadata
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import message_of
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from benchmarks import __main__ as benchmark
from helpers import checks, models
from helpers.checkpoints import get_checkpoint
from helpers.checks import check_versions

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def hub(monkeypatch, pocket, tmp_path):
    """The Hub as the checks see it: nothing cached, access granted, 33 GB to download, 100 GB of disk free."""
    monkeypatch.setenv("TUTORIAL_MODELS", "full")
    state = SimpleNamespace(access=Mock(), token="hf_x", free=100e9, cached=None, folder=tmp_path / "r")

    def snapshot_download(repo_id, local_files_only):
        assert local_files_only  # nothing is downloaded here
        if state.cached is None:
            raise LocalEntryNotFoundError("not cached")
        return str(state.cached)

    files = [("transformer/diffusion_pytorch_model.safetensors", 33e9), ("flux1-dev.safetensors", 24e9)]
    siblings = [SimpleNamespace(rfilename=name, size=int(size)) for name, size in files]
    monkeypatch.setattr(checks, "snapshot_download", snapshot_download)
    monkeypatch.setattr(checks, "auth_check", state.access)
    monkeypatch.setattr(checks, "get_token", lambda: state.token)
    monkeypatch.setattr(checks, "try_to_load_from_cache", lambda repo_id, file: None)
    monkeypatch.setattr(checks.HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=state.free))
    monkeypatch.setattr(checks.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return state


def http_error() -> type[Exception]:
    """The base error of the HTTP library that huggingface_hub uses."""
    bases = RepositoryNotFoundError.__mro__
    return next(base for base in bases if base.__module__.startswith(("httpx", "requests")))


def answer(kind: type[Exception], status: int = 401) -> Exception:
    """An error of the Hub as huggingface_hub raises it."""
    return kind("an answer of\nseveral lines", response=Mock(headers={}, status_code=status))


REFUSALS = {
    "no network": (lambda: http_error()("no route"), "the Hub cannot be reached .*: check the network"),
    "connection refused": (lambda: ConnectionRefusedError(111, "refused"), "the Hub cannot be reached"),
    "slow network": (lambda: TimeoutError(110, "timed out"), "the Hub cannot be reached"),
    "offline": (lambda: OfflineModeIsEnabled("offline"), "offline mode is on: unset HF_HUB_OFFLINE"),
    "gated": (lambda: answer(GatedRepoError), "gated and your account has not accepted .*https://huggingface.co/"),
    "not found": (lambda: answer(RepositoryNotFoundError, 404), "does not show .* check the name, log in again with"),
    "bad token": (lambda: answer(HfHubHTTPError, 401), "refuses your token .*401.* log in again with `hf auth login`"),
    "token without the right": (lambda: answer(HfHubHTTPError, 403), "refuses your token .*403"),
    "busy": (lambda: answer(HfHubHTTPError, 503), "The Hub fails .*503.* try again later"),
    "read-only cache": (lambda: OSError(errno.EROFS, "x", "/cache"), "/cache cannot be written .*HF_HOME"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_hub_refuses_is_one_sentence_for_lessons_and_benchmark(refusal, hub, monkeypatch):
    make, sentence = REFUSALS[refusal]
    hub.access.side_effect = make()
    text = message_of(get_checkpoint, "flux")
    assert re.search(sentence, text) and "unset TUTORIAL_MODELS to use the pocket checkpoint" in text
    arguments = ["benchmarks", "--checkpoint", FLUX, "--results", str(hub.folder), "--only", "eager"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("TUTORIAL_CACHE", str(hub.folder))
    same = message_of(benchmark.run, benchmark.parse())
    assert same == text.replace("unset TUTORIAL_MODELS to use the pocket checkpoint", "give another checkpoint")


def test_offline_mode_of_the_library_itself(pocket, monkeypatch, tmp_path):
    """Nothing replaced: which errors huggingface_hub raises is its own affair."""
    monkeypatch.setenv("TUTORIAL_MODELS", "full")
    monkeypatch.setattr(checks.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on: unset HF_HUB_OFFLINE" in message_of(get_checkpoint, "flux")


def test_no_way_to_the_hub(pocket, monkeypatch, tmp_path):
    """The same, where nobody listens; it takes one try."""
    monkeypatch.setattr(checks.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checks.auth_check.__self__, "endpoint", "http://127.0.0.1:9")
    start = time.monotonic()
    assert "the Hub cannot be reached" in message_of(checks.find_on_hub, FLUX)
    assert time.monotonic() - start < 5


def test_full_checkpoint_with_access(hub):
    checkpoint = get_checkpoint("flux")
    assert (checkpoint.path, checkpoint.height, checkpoint.max_sequence_length) == (FLUX, 1024, 512)
    hub.access.assert_called_once_with(FLUX)


def test_full_checkpoint_in_the_cache_needs_no_network(hub, tiny_checkpoint):
    hub.cached = tiny_checkpoint
    hub.access.side_effect = OfflineModeIsEnabled("offline")
    assert get_checkpoint("flux").path == checks.find_on_hub(FLUX) == str(tiny_checkpoint)


def test_half_downloaded_checkpoint_is_not_in_the_cache(hub, pocket):
    (pocket / "transformer/diffusion_pytorch_model.safetensors").unlink()
    hub.cached = pocket
    assert get_checkpoint("flux").path == FLUX


def test_gated_without_token(hub):
    hub.token = None
    hub.access.side_effect = answer(GatedRepoError)
    text = message_of(get_checkpoint, "flux")
    assert "hf auth login" in text and f"https://huggingface.co/{FLUX}" in text


def test_token_that_cannot_be_sent(hub):
    hub.token = "hf_\u201cquoted\u201d"
    assert "characters that no token has" in message_of(get_checkpoint, "flux")


def test_name_that_no_repository_has():
    assert "no repository id" in message_of(checks.find_on_hub, "owner/na me")


def test_repository_that_holds_no_pipeline(hub, monkeypatch):
    monkeypatch.setattr(models, "hf_hub_download", Mock(side_effect=answer(RemoteEntryNotFoundError, 404)))
    assert "is no diffusers pipeline" in message_of(models.read_index, FLUX)


def test_network_that_goes_in_the_middle(hub, monkeypatch):
    monkeypatch.setattr(models, "hf_hub_download", Mock(side_effect=LocalEntryNotFoundError("no route")))
    assert "cannot be reached" in message_of(models.read_index, FLUX)
    monkeypatch.setattr(checks.HfApi, "model_info", Mock(side_effect=http_error()("no route")))
    assert "cannot be reached" in message_of(models._weight_sizes, FLUX)
    assert "unset TUTORIAL_MODELS" in message_of(get_checkpoint, "flux")


def test_full_without_space(hub):
    hub.free = 32e9
    text = message_of(get_checkpoint, "flux")
    assert "needs 33.0 GB" in text and "32.0 GB free" in text and "HF_HOME" in text


def test_no_space_is_needed_for_what_is_cached(hub, monkeypatch):
    monkeypatch.setattr(checks, "try_to_load_from_cache", lambda repo_id, file: "/cache/" + file)
    hub.free = 0
    assert get_checkpoint("flux").path == FLUX


def test_cache_of_the_hub_that_cannot_be_written(hub, monkeypatch):
    monkeypatch.setattr(checks.constants, "HF_HUB_CACHE", __file__)
    assert f"{__file__} cannot be written (a file stands" in message_of(get_checkpoint, "flux")


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

import shutil
from collections import namedtuple

import pytest
import torch
from conftest import build_pipeline

from benchmarks import random_checkpoints
from helpers.checkpoints import find_fault
from helpers.errors import TutorialError


def test_parameter_counts_are_the_published_ones():
    billions = {name: count / 1e9 for name, count in random_checkpoints.count_parameters().items()}
    assert billions["transformer"] == pytest.approx(11.9, abs=0.05)
    assert billions["text_encoder_2"] == pytest.approx(4.76, abs=0.005)
    assert billions["text_encoder"] == pytest.approx(0.123, abs=0.001)


@pytest.fixture
def small(monkeypatch):
    """Two tiny components instead of the four large ones."""
    parts = {name: getattr(build_pipeline(), name) for name in ("text_encoder", "text_encoder_2")}
    builders = {name: lambda part=part: type(part)(part.config) for name, part in parts.items()}
    monkeypatch.setattr(random_checkpoints, "flux_components", lambda: builders)
    # The two that are left out are not missing: model_index.json names them.
    monkeypatch.setattr(random_checkpoints.checkpoints, "find_fault", lambda folder: None)


def test_build_is_made_once_and_redone_after_an_interruption(small, tmp_path, capsys):
    folder = tmp_path / "random-flux"
    part = tmp_path / "random-flux.part"
    (part / "transformer").mkdir(parents=True)  # what an interrupted build left
    random_checkpoints.build_flux(folder)
    assert not part.exists() and (folder / "text_encoder_2" / "model.safetensors").is_file()
    assert "transformer/ is missing" in find_fault(folder)  # only the two tiny ones were built
    changed = (folder / "text_encoder" / "model.safetensors").stat().st_mtime_ns
    random_checkpoints.build_flux(folder)
    assert "there already" in capsys.readouterr().out
    assert (folder / "text_encoder" / "model.safetensors").stat().st_mtime_ns == changed


def test_weights_are_random_and_norms_are_ones():
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    module = random_checkpoints.fill(module, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert module[0].weight.dtype == torch.bfloat16
    assert module[0].weight.detach().float().std() == pytest.approx(0.02, rel=0.1)
    assert module[0].bias.eq(0).all() and module[1].weight.eq(1).all()


def test_too_small_a_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 3 * 10**9))
    with pytest.raises(TutorialError, match="needs 35 GB of disk .* has 3 GB free"):
        random_checkpoints.build_flux(tmp_path / "random-flux")
    assert list(tmp_path.iterdir()) == []

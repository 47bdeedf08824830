"""Unit tests of helpers.activity."""

import json

import pytest
import torch

from benchmarks.writing import save_activities
from helpers.activity import Activity, busy_ms, hidden_share, load_activities, record_activity
from helpers.devices import environment


def copies(*spans):
    return [Activity("copy to the accelerator", *span) for span in spans]


def kernels(*spans):
    return [Activity("compute", *span) for span in spans]


def test_hidden_share_is_the_part_of_the_copies_under_compute():
    activities = copies((0, 10), (20, 30)) + kernels((5, 22), (28, 29), (40, 50))
    assert hidden_share(activities) == pytest.approx((5 + 2 + 1) / 20)


@pytest.mark.parametrize(("spans", "share"), [([(0, 10)], 1.0), ([(10, 20)], 0.0), ([(2, 4), (3, 7)], 0.5)])
def test_hidden_share_at_the_limits(spans, share):
    assert hidden_share(copies((0, 10)) + kernels(*spans)) == pytest.approx(share)


def test_hidden_share_without_copies_is_an_error():
    with pytest.raises(ValueError, match="nothing was copied"):
        hidden_share(kernels((0, 1)))


def test_busy_time_counts_overlaps_once():
    assert busy_ms(copies((0, 4), (2, 6), (8, 9)), "copy to the accelerator") == 7
    assert busy_ms([], "compute") == 0


def test_a_cpu_has_no_activities_and_the_function_is_called(monkeypatch):
    monkeypatch.setattr("helpers.activity.accelerator", lambda: torch.device("cpu"))
    calls = []
    assert record_activity(lambda: calls.append(1)) == []
    assert calls == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_copy_and_a_product_are_recorded():
    host = torch.ones(2**22, pin_memory=True)

    def work():
        card = host.cuda()
        return (card.view(2048, 2048) @ card.view(2048, 2048)).cpu()

    kinds = {activity.kind for activity in record_activity(work)}
    assert kinds == {"copy to the accelerator", "compute", "copy back"}


def test_saved_activities_come_back_joined_and_from_the_window(tmp_path):
    activities = copies((0, 10), (12, 14)) + kernels((11, 13), (12, 16), (30, 31))
    save_activities({"leaf": activities}, tmp_path / "a.json", 11, 20)
    assert load_activities(tmp_path / "a.json") == {
        "leaf": [Activity("copy to the accelerator", 1, 3), Activity("compute", 0, 5)]
    }
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert saved["environment"] == environment()

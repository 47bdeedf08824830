"""benchmarks/slow_bus.py copies each block as often as it says, and writes its rows."""

import json
import sys

import pytest
import torch
from conftest import draw

from benchmarks import slow_bus
from helpers import devices, streaming

DEVICE = devices.accelerator()


@pytest.mark.parametrize("copies", [1, 3])
def test_blocks_are_copied_so_often(copies, nf4_pipeline, monkeypatch):
    pipeline = nf4_pipeline.to(DEVICE)
    expected = draw(pipeline)
    streamed = streaming.stream_blocks(pipeline.transformer, 0.00013)
    slow_bus.copy_again(streamed.ring, copies)
    copied = {parcel.host.data_ptr(): 0 for parcel in streamed.parcels if parcel.host is not None}
    copy_ = torch.Tensor.copy_

    def count(target, source, **settings):
        if target.device.type == DEVICE.type and source.data_ptr() in copied:
            copied[source.data_ptr()] += 1
        return copy_(target, source, **settings)

    monkeypatch.setattr(torch.Tensor, "copy_", count)
    assert (draw(pipeline) == expected).all()
    assert copied and min(copied.values()) >= copies and {count % copies for count in copied.values()} == {0}


def test_rows_are_written(tiny_checkpoint, nf4_pipeline, tmp_path, monkeypatch, capsys):
    nf4_pipeline.save_pretrained(tmp_path / "nf4")
    monkeypatch.setattr(slow_bus, "CALL", {"prompt": "cat", "num_inference_steps": 2, "height": 32, "width": 32})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: None)
    command = ["slow_bus", str(tmp_path / "nf4"), "--budgets", "0.00013", "1", "--results", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", command)
    slow_bus.main()
    (file,) = (tmp_path / "r").glob("slow-bus_*.json")
    rows = json.loads(file.read_text())
    assert [(row["budget_gb"], row["copies"]) for row in rows] == [(b, c) for b in (0.00013, 1) for c in (1, 2, 4)]
    assert all(row["step_ms"] > 0 and row["resident_ms"] > 0 and row["bus_gb_s"] > 0 for row in rows)
    assert [row["copied_gb"] > 0 for row in rows] == [True] * 3 + [False] * 3
    monkeypatch.setattr(sys, "argv", [*command[:3], "0.00000001", *command[4:]])
    with pytest.raises(SystemExit, match="The largest block takes"):
        slow_bus.main()
    monkeypatch.setattr(sys, "argv", ["slow_bus", str(tmp_path / "r")])
    with pytest.raises(SystemExit, match="has no complete pipeline"):
        slow_bus.main()

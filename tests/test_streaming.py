"""Streaming on a CPU with plain copies, and on a GPU, if there is one, with streams."""

import pytest
import tiny_pipelines
import torch
from conftest import draw

from helpers import streaming

DEVICE = str(torch.accelerator.current_accelerator() or "cpu")
EVERY_FAMILY = pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)


def build(family):
    pipeline = tiny_pipelines.build(family)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()  # as `from_pretrained` does
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_of(family, **changes):
    call = {"prompt": "cat", "num_inference_steps": 3, "output_type": "pt", "return_dict": False}
    return call | tiny_pipelines.CALLS.get(family, {"height": 32, "width": 32}) | changes


def run(pipeline, family, **changes):
    with torch.no_grad():
        return pipeline(**call_of(family, **changes), generator=torch.Generator().manual_seed(0))[0]


def largest(pipeline, name="transformer"):
    model = getattr(pipeline, name)
    return max(sum(t.nbytes + 256 for t in streaming.tensors_of(b)) for b in streaming.find_blocks(model))


@EVERY_FAMILY
def test_pictures_of_a_filled_card_are_the_resident_ones(family):
    pipeline = build(family)
    expected = run(pipeline.to(DEVICE), family)
    pipeline.to("cpu")
    filled = streaming.fill_card(pipeline, limit_gb=1, **call_of(family))
    print(filled)
    assert torch.equal(run(pipeline, family), expected)
    for s in filled.parts.values():
        pass
    filled.remove()
    assert torch.equal(run(pipeline.to(DEVICE), family), expected)

import time

import numpy as np
import pytest
import torch
from conftest import draw
from diffusers.hooks import HookRegistry, apply_group_offloading

from helpers import cpu_backend, devices, residency
from helpers.residency import record_residency

COMPONENTS = ["text_encoder", "text_encoder_2", "transformer", "vae"]  # in the order in which a call needs them


def by_component(events, field):
    return {event.component: getattr(event, field) for event in events}


def total_bytes(pipeline):
    return {name: sum(sizes.values()) for name, sizes in devices.component_footprints(pipeline).items()}


def overrides(pipeline):
    """The methods of the pipeline, of its hooks and groups that something has put another function over."""
    objects = [pipeline, pipeline.scheduler]
    for name in COMPONENTS:
        for module in getattr(pipeline, name).modules():
            objects += residency._accelerate_hooks(module)
            registry = getattr(module, "_diffusers_hook", None)
            objects += [hook.group for hook in (registry.hooks.values() if registry else ()) if hasattr(hook, "group")]
    return {key for target in objects for key in vars(target) if callable(getattr(type(target), key, None))}


def test_residency_without_offloading(bf16_pipeline):
    bf16_pipeline.to(devices.accelerator())
    with record_residency(bf16_pipeline) as events:
        draw(bf16_pipeline)
    assert by_component(events, "bytes") == total_bytes(bf16_pipeline)
    assert {event.onload_s for event in events} == {0} and len({event.offload_s for event in events}) == 1
    assert {event.moved_bytes for event in events} == {0}


def test_residency_under_model_offload(nf4_pipeline):
    nf4_pipeline.enable_model_cpu_offload(device=devices.accelerator())
    sizes = total_bytes(nf4_pipeline)
    expected = draw(nf4_pipeline, num_inference_steps=1)
    with record_residency(nf4_pipeline) as events:
        np.testing.assert_array_equal(draw(nf4_pipeline, num_inference_steps=1), expected)
        draw(nf4_pipeline, num_inference_steps=1)  # diffusers puts new hooks in place after each call
    assert [event.component for event in events] == COMPONENTS * 2
    for event, later in zip(events, [*events[1:], None], strict=True):
        assert event.bytes == event.moved_bytes == sizes[event.component] and event.onloads == 1
        assert event.onload_s < event.offload_s
        assert later is None or event.offload_s <= later.onload_s
    assert overrides(nf4_pipeline) == set()
    with record_residency(nf4_pipeline) as again:
        draw(nf4_pipeline, num_inference_steps=1)
    assert [event.component for event in again] == COMPONENTS and len(events) == 8


def test_residency_under_sequential_offload(bf16_pipeline):
    sizes = total_bytes(bf16_pipeline)
    bf16_pipeline.enable_sequential_cpu_offload(device=devices.accelerator())
    cpu_backend.fix_sequential_offload(bf16_pipeline)
    with record_residency(bf16_pipeline) as events:
        draw(bf16_pipeline, num_inference_steps=2)
    assert [event.component for event in events] == COMPONENTS
    assert all(event.bytes < 0.3 * sizes[event.component] for event in events)  # one layer at a time
    moved = by_component(events, "moved_bytes")
    assert moved["transformer"] == 2 * sizes["transformer"]  # all of it again in each step
    assert moved["vae"] < sizes["vae"]  # the encoder half is never called
    assert overrides(bf16_pipeline) == set()


def test_residency_under_group_offload(bf16_pipeline):
    device = devices.accelerator()
    sizes = total_bytes(bf16_pipeline)
    bf16_pipeline.to(device)
    offload = {"onload_device": device, "offload_device": torch.device("cpu")}
    apply_group_offloading(bf16_pipeline.transformer, offload_type="block_level", num_blocks_per_group=1, **offload)
    apply_group_offloading(bf16_pipeline.text_encoder_2, offload_type="leaf_level", **offload)
    with record_residency(bf16_pipeline) as events:
        draw(bf16_pipeline, num_inference_steps=2)
    # The other two have no hooks: they stay all the time, and come first.
    assert [event.component for event in events] == ["vae", "text_encoder", "text_encoder_2", "transformer"]
    size, moved = by_component(events, "bytes"), by_component(events, "moved_bytes")
    assert size["vae"] == sizes["vae"] and moved["vae"] == 0
    assert size["transformer"] < 0.7 * sizes["transformer"] and moved["transformer"] == 2 * sizes["transformer"]
    assert size["text_encoder_2"] < 0.3 * sizes["text_encoder_2"]
    assert overrides(bf16_pipeline) == set()


def test_an_emptied_group_does_not_count(bf16_pipeline):
    device = devices.accelerator()
    bf16_pipeline.to(device)
    transformer = bf16_pipeline.transformer
    apply_group_offloading(transformer, device, torch.device("cpu"), "block_level", num_blocks_per_group=1)
    group = HookRegistry.check_if_exists_or_initialize(transformer).get_hook("group_offloading").group
    group.onload_()
    group.modules, group.parameters, group.buffers = [], [], []
    with record_residency(bf16_pipeline) as events:
        draw(bf16_pipeline, num_inference_steps=1)
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    assert by_component(events, "onloads")["transformer"] == blocks


def test_recording_ends_cleanly_after_an_error(bf16_pipeline):
    bf16_pipeline.enable_model_cpu_offload(device=devices.accelerator())
    with pytest.raises(ZeroDivisionError), record_residency(bf16_pipeline) as events:
        bf16_pipeline.encode_prompt("cat", "cat", max_sequence_length=16)
        time.sleep(0.1)
        raise ZeroDivisionError
    assert [event.component for event in events] == COMPONENTS[:2]
    assert events[1].offload_s > events[1].onload_s + 0.1  # still there: until the end of the recording
    assert overrides(bf16_pipeline) == set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_residency_is_where_the_weights_are(nf4_pipeline):
    nf4_pipeline.enable_model_cpu_offload()
    seen = []

    def look(pipeline, index, timestep, inputs):
        seen.append({name for name in COMPONENTS if getattr(pipeline, name).device.type == "cuda"})
        return {}

    with record_residency(nf4_pipeline) as events:
        draw(nf4_pipeline, callback_on_step_end=look)
    assert seen == [{"transformer"}] * 3
    assert [event.component for event in events] == COMPONENTS

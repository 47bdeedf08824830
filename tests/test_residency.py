import time

import numpy as np
import pytest
import tiny_pipelines
import torch
from accelerate.hooks import CpuOffload
from conftest import build_pipeline, draw
from diffusers import ControlNetModel, FluxImg2ImgPipeline, FluxPipeline, StableDiffusionXLControlNetPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading

from helpers import cpu_backend, devices, residency
from helpers.errors import TutorialError
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
            objects += residency._hooks(module)
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


# Parts that several pipelines share


METHODS = (CpuOffload.pre_forward, torch.nn.Module.to)


@pytest.fixture
def offloaded(bf16_pipeline):
    """The tiny pipeline under model offload. Nothing watches it any more when the test is over."""
    bf16_pipeline.enable_model_cpu_offload(device=devices.accelerator())
    yield bf16_pipeline
    assert (CpuOffload.pre_forward, torch.nn.Module.to) == METHODS and overrides(bf16_pipeline) == set()


def stays(events):
    return [event.component for event in events]


def together(events, first, second):
    """Whether two components are there at the same time, at some time."""
    pairs = [(a, b) for a in events for b in events if (a.component, b.component) == (first, second)]
    return any(a.onload_s < b.offload_s and b.onload_s < a.offload_s for a, b in pairs)


def second_pipeline(pipeline):
    """What draws from precomputed embeddings with the transformer and the VAE of another pipeline."""
    second = FluxPipeline(pipeline.scheduler, pipeline.vae, None, None, None, None, pipeline.transformer)
    second.set_progress_bar_config(disable=True)
    return second


def draw_from_embeddings(pipeline, embeddings):
    return draw(pipeline, prompt=None, prompt_embeds=embeddings[0], pooled_prompt_embeds=embeddings[1])


def embed(pipeline):
    return pipeline.encode_prompt("cat", "cat", max_sequence_length=16)


def test_a_second_pipeline_with_shared_parts(offloaded):
    sizes, second, embeddings = total_bytes(offloaded), second_pipeline(offloaded), embed(offloaded)
    with record_residency(second) as events:
        draw_from_embeddings(second, embeddings)
        time.sleep(0.05)
    assert [(event.component, event.bytes) for event in events] == [(name, sizes[name]) for name in COMPONENTS[2:]]
    transformer, vae = events
    assert transformer.offload_s <= vae.onload_s  # the hooks of the first pipeline say so
    assert vae.offload_s > vae.onload_s + 0.05  # and nobody says that the VAE leaves


def test_the_first_pipeline_while_the_second_is_called(offloaded):
    second = second_pipeline(offloaded)
    with record_residency(offloaded) as events:
        draw_from_embeddings(second, embed(offloaded))
        draw_from_embeddings(second, embed(offloaded))
    # The VAE of the first picture stays while the second picture is made.
    assert stays(events) == [*COMPONENTS, *COMPONENTS[:3]]
    assert together(events, "vae", "transformer") and not together(events, "text_encoder_2", "transformer")


def test_a_second_pipeline_that_takes_the_hooks_over(offloaded):
    second = second_pipeline(offloaded)
    second.enable_model_cpu_offload(device=devices.accelerator())
    with record_residency(offloaded) as events:
        draw(offloaded)  # puts its own hooks back in the end
    assert stays(events) == COMPONENTS and together(events, "text_encoder_2", "transformer")
    with record_residency(offloaded) as events:
        draw(offloaded)
    assert stays(events) == COMPONENTS and not together(events, "text_encoder_2", "transformer")


@pytest.mark.parametrize("enables", [False, True])
def test_a_pipeline_made_by_from_pipe(offloaded, enables):
    second = FluxImg2ImgPipeline.from_pipe(offloaded, dtype=torch.bfloat16)
    second.set_progress_bar_config(disable=True)
    if enables:
        second.enable_model_cpu_offload(device=devices.accelerator())
    image = np.zeros((32, 32, 3), dtype=np.float32)
    with record_residency(second) as events:
        draw(second, image=image, strength=0.9)
        draw(second, image=image, strength=0.9)
    vae = [event for event in events if event.component == "vae"]
    # It encodes, and is there until something says that it leaves: nothing before the end of the call does.
    assert together(events, "vae", "transformer")
    assert len(vae) == (2 if enables else 1) and vae[0].offload_s >= events[3].onload_s
    assert stays(events).count("transformer") == 2


def test_replaced_parts(offloaded):
    own, other = offloaded.vae, build_pipeline().vae
    with pytest.raises(TutorialError, match="The vae was replaced.*before record_residency"):
        with record_residency(offloaded):
            offloaded.vae = other
    offloaded.vae = own
    with pytest.raises(ZeroDivisionError), record_residency(offloaded):
        offloaded.vae = other
        raise ZeroDivisionError  # is not hidden by what the recording says


@pytest.mark.skipif(cpu_backend.has_gpu(), reason="a GPU tells where a part is")
def test_a_part_without_a_hook_under_model_offload(offloaded):
    offloaded.vae = build_pipeline().vae
    with pytest.raises(TutorialError, match="does not move the vae.*enable_model_cpu_offload"):
        with record_residency(offloaded):
            pass
    offloaded.enable_model_cpu_offload(device=devices.accelerator())
    with record_residency(offloaded) as events:
        draw(offloaded)
    assert stays(events) == COMPONENTS


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_group_offload"])
def test_offloading_turned_on_inside_the_block(bf16_pipeline, offload):
    device = devices.accelerator()
    settings = {"device": device} if "model" in offload else {"onload_device": device, "offload_type": "leaf_level"}
    bf16_pipeline.to(device)
    with pytest.raises(TutorialError, match="text_encoder was replaced, or its offloading changed"):
        with record_residency(bf16_pipeline):
            getattr(bf16_pipeline, offload)(**settings)


def test_a_part_with_two_names_is_there_once():
    pipeline = tiny_pipelines.build("wan22").to(devices.accelerator())
    pipeline.transformer_2 = pipeline.transformer
    with record_residency(pipeline) as events:
        pass
    assert sorted(stays(events)) == ["text_encoder", "transformer", "vae"]


def test_a_stay_ends_when_the_call_ends(offloaded):
    second, embeddings = second_pipeline(offloaded), embed(offloaded)
    second.enable_model_cpu_offload(device=devices.accelerator())
    with record_residency(second) as events:
        for _ in range(2):  # the transformer alone: no other component comes in between
            second(
                prompt_embeds=embeddings[0],
                pooled_prompt_embeds=embeddings[1],
                height=32,
                width=32,
                num_inference_steps=1,
                output_type="latent",
            )
            time.sleep(0.05)
    assert stays(events) == ["transformer", "transformer"]
    assert events[1].onload_s > events[0].offload_s + 0.05 and events[0].onloads == 1


def test_several_parts_at_once_with_a_control_net():
    parts = tiny_pipelines.build("sdxl").components
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 16)).to(torch.bfloat16)
    pipeline = StableDiffusionXLControlNetPipeline(**parts, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_model_cpu_offload(device=devices.accelerator())
    with record_residency(pipeline) as events:
        pipeline("cat", image=torch.zeros(1, 3, 32, 32), num_inference_steps=2, height=32, width=32, output_type="np")
    assert stays(events) == ["text_encoder", "text_encoder_2", "controlnet", "unet", "vae"]
    assert together(events, "controlnet", "unet")
    assert together(events, "controlnet", "text_encoder_2")  # which leaves only when the UNet comes
    assert not together(events, "unet", "vae")


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

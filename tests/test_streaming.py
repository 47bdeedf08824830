"""Streaming on a CPU with plain copies, and on a GPU, if there is one, with streams."""

import copy
import gc
import os
import subprocess
import sys
import weakref

import psutil
import pytest
import tiny_pipelines
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtAlphaPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from peft import LoraConfig

from benchmarks import strategies
from helpers import cpu_backend, models, streaming
from helpers.checkpoints import PACKAGE_ROOT

DEVICE = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
POCKET = str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")
logging.disable_progress_bar()


def build(family):
    """A pipeline in eval mode on the host; "nf4" is pocket-flux with 4-bit weights."""
    if family == "nf4":
        cpu_backend.enable()
        pipeline = strategies.quantize_at_load(models.find_model(POCKET)).to("cpu")
    elif family == "pocket":
        pipeline = strategies.load_bf16(models.find_model(POCKET)).to("cpu")
    else:
        pipeline = tiny_pipelines.build(family)
    for model in modules_of(pipeline).values():
        model.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def modules_of(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def test_a_build_for_cards_on_a_machine_without_one(monkeypatch):
    """pip gives it to every Linux machine: torch names the accelerator that it was built for unless it is to look."""

    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert streaming.Ring(None).device.type == "cpu"


def call_of(family, **changes):
    call = {"prompt": "cat", "num_inference_steps": 3, "output_type": "pt"}
    return call | tiny_pipelines.CALLS.get(family, {"height": 32, "width": 32}) | changes


def run(pipeline, family, **changes):
    return pipeline(**call_of(family, **changes), generator=torch.Generator().manual_seed(0))[0].cpu()


def blocks_gb(model):
    """Bytes of all blocks, and of the largest, in GB."""
    sizes = [streaming.Parcel(streaming.tensors_of(block), DEVICE).bytes for block in streaming.find_blocks(model)]
    return sum(sizes) / 1e9, max(sizes) / 1e9


def filled_to(pipeline, family, share):
    """Fill the card with so little that this share of the blocks that run at each step has room.

    Tiny models are smaller than the pages that a GPU reserves: what a call takes beside weights counts as nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cuda":
            patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
            patch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0)
        filled = streaming.fill_card(pipeline, 50, **call_of(family))
        parts = [part for part in filled.parts.values() if isinstance(part.model, ModelMixin)]
        blocks = sum(parcel.bytes for part in parts for parcel in part.parcels)
        return streaming.fill_card(pipeline, filled.least_gb + share * blocks / 1e9, **call_of(family))


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("family", [*tiny_pipelines.FAMILIES, "pocket", "nf4"])
def test_pictures_of_a_filled_card_are_the_resident_ones(family, share):
    pipeline = build(family)
    expected = run(pipeline.to(DEVICE), family)
    pipeline.to("cpu")
    weights = {name: part.state_dict() for name, part in modules_of(pipeline).items()}
    filled = filled_to(pipeline, family, share)
    print(filled)
    streamed = [p for part in filled.parts.values() for p in part.parcels if p.host is not None]
    assert streamed
    assert pipeline._execution_device.type == DEVICE.type
    assert torch.equal(run(pipeline, family), expected)
    assert torch.equal(run(pipeline, family), expected)
    filled.remove()
    for name, part in modules_of(pipeline).items():
        assert not any("_streamed" in vars(module) or "_apply" in vars(module) for module in part.modules())
        assert not any(isinstance(module, streaming.StreamedBlock) for module in part.modules())
        after = part.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in weights[name].items())
    assert torch.equal(run(pipeline.to(DEVICE), family), expected)


# One model


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_the_budget_is_spent_and_the_blocks_that_stay_are_spread_evenly(share):
    pipeline = build("pocket")
    expected = run(pipeline.to(DEVICE), "pocket")
    whole, largest = blocks_gb(pipeline.transformer)
    streamed = streaming.stream_blocks(pipeline.transformer, share * whole)
    stay = [parcel.host is None for parcel in streamed.parcels]
    held = sum(parcel.bytes for parcel in streamed.parcels if parcel.host is None) / 1e9
    assert share * whole - largest <= held + streamed.ring.size / 1e9 <= share * whole + 1e-9
    assert all(stay) == (share == 1.0)
    # What is small stays: to point to it takes longer than it saves.
    assert all(tensor.nbytes >= largest * 1e6 * 0.99 for parcel in streamed.parcels for tensor in parcel.tensors)
    assert any(tensor.nbytes < largest * 1e6 for tensor in streamed.rest.tensors)
    double = len(pipeline.transformer.transformer_blocks)
    if not all(stay[:double]):  # the largest first, and what is left for another of them to smaller ones
        assert sum(stay[double:]) <= 2
    for kind in (stay[:double], stay[double:]):
        places = [index for index, stays in enumerate(kind) if stays]
        gaps = {after - before for before, after in zip(places, places[1:], strict=False)}
        assert len(gaps) < 2 or max(gaps) - min(gaps) == 1
    assert torch.equal(run(pipeline, "pocket"), expected)


def test_with_enough_budget_nothing_is_copied(monkeypatch):
    pipeline = build("pocket").to(DEVICE)
    whole, _ = blocks_gb(pipeline.transformer)
    streaming.stream_blocks(pipeline.transformer, whole)
    monkeypatch.delattr(streaming.Ring, "copy")
    run(pipeline, "pocket")


def test_copies_run_ahead_over_the_end_of_a_forward():
    """Each copy starts before its block is asked for, once the order is known."""
    pipeline = build("pocket").to(DEVICE)
    _, largest = blocks_gb(pipeline.transformer)
    streamed = streaming.stream_blocks(pipeline.transformer, 2 * largest)
    ring, log = streamed.ring, []
    copied, taken = ring.copy, ring.take
    ring.copy = lambda parcel: copied(parcel) and not log.append(("copy", streamed.parcels.index(parcel)))
    ring.take = lambda parcel: (log.append(("take", streamed.parcels.index(parcel))), taken(parcel))
    x = [("take", index) for index in range(len(streamed.parcels))]
    run(pipeline, "pocket", num_inference_steps=1)
    assert [entry for entry in log if entry[0] == "take"] == x
    assert all(log.index(("copy", i)) < log.index(("take", i)) for i in range(1, len(x)))
    assert ("copy", 0) in log[log.index(x[-1]) :]


def test_blocks_in_another_order_and_blocks_that_are_left_out():
    """A guess about the order that turns out wrong costs time, and nothing else."""
    pipeline = build("pocket").to(DEVICE)
    transformer = pipeline.transformer
    expected = run(pipeline, "pocket")
    blocks = list(transformer.single_transformer_blocks)
    transformer.single_transformer_blocks = torch.nn.ModuleList(blocks[1:])
    fewer = run(pipeline, "pocket")
    transformer.single_transformer_blocks = torch.nn.ModuleList(blocks[::-1])
    turned = run(pipeline, "pocket")
    transformer.single_transformer_blocks = torch.nn.ModuleList(blocks)
    _, largest = blocks_gb(transformer)
    streaming.stream_blocks(transformer, 2.5 * largest)
    for order, picture in ((blocks, expected), (blocks[1:], fewer), (blocks[::-1], turned), (blocks, expected)):
        transformer._modules["single_transformer_blocks"] = torch.nn.ModuleList(order)
        assert torch.equal(run(pipeline, "pocket"), picture)


@pytest.mark.parametrize("before", [True, False])
def test_compiled_blocks(before):
    """A compiled block is one graph, as without streaming, and all blocks of a kind share it."""
    pipeline = build("pocket").to(DEVICE)
    torch._dynamo.reset()
    resident, counter = torch._dynamo.testing.CompileCounter(), torch._dynamo.testing.CompileCounter()
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=resident)
    expected = run(pipeline, "pocket")
    torch._dynamo.reset()
    for block in streaming.find_blocks(pipeline.transformer):
        block._compiled_call_impl = None
    whole, _ = blocks_gb(pipeline.transformer)
    if before:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    streaming.stream_blocks(pipeline.transformer, whole / 2)
    if not before:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert torch.equal(run(pipeline, "pocket"), expected)
    assert torch.equal(run(pipeline, "pocket"), expected)
    assert counter.frame_count == resident.frame_count > 1


def test_the_whole_model_compiled():
    pipeline = build("pocket").to(DEVICE)
    expected = run(pipeline, "pocket")
    whole, _ = blocks_gb(pipeline.transformer)
    streaming.stream_blocks(pipeline.transformer, whole / 2)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert torch.equal(run(pipeline, "pocket"), expected)


def add_lora(transformer):
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "proj_mlp"]), "style")


@pytest.mark.parametrize("family", ["pocket", "nf4"])
def test_a_lora_before_or_after(family):
    pipeline = build(family)
    plain = run(pipeline.to(DEVICE), family)
    add_lora(pipeline.transformer)
    expected = run(pipeline.to(DEVICE), family)
    assert not torch.equal(expected, plain)
    pipeline.transformer.delete_adapters("style")
    pipeline.to("cpu")
    filled_to(pipeline, family, 0.2)
    assert torch.equal(run(pipeline, family), plain)
    add_lora(pipeline.transformer)
    assert torch.equal(run(pipeline, family), expected)
    filled_to(pipeline, family, 0.2)  # again, with the LoRA in place
    assert torch.equal(run(pipeline, family), expected)
    pipeline.transformer.delete_adapters("style")
    assert torch.equal(run(pipeline, family), plain)


def test_weights_that_change_between_calls():
    """In place, as a hot-swapped or fused LoRA changes them, and by another tensor."""
    pipeline = build("pocket").to(DEVICE)
    first = pipeline.transformer.transformer_blocks[0].attn.to_q
    old = first.weight.detach().clone()
    expected = [run(pipeline, "pocket")]
    first.weight.data.mul_(2)
    expected.append(run(pipeline, "pocket"))
    first.weight.data.copy_(old)
    streaming.stream_blocks(pipeline.transformer, 2.5 * blocks_gb(pipeline.transformer)[1])
    assert torch.equal(run(pipeline, "pocket"), expected[0])
    first.weight.data.mul_(2)
    assert torch.equal(run(pipeline, "pocket"), expected[1])
    first.weight.data = old.clone()
    assert torch.equal(run(pipeline, "pocket"), expected[0])


@pytest.mark.parametrize("before", [True, False])
def test_a_cache_that_skips_blocks(before):
    pipeline = build("pocket").to(DEVICE)
    plain = run(pipeline, "pocket", num_inference_steps=6)
    cache = FirstBlockCacheConfig(threshold=0.9)
    pipeline.transformer.enable_cache(cache)
    expected = run(pipeline, "pocket", num_inference_steps=6)
    assert not torch.equal(expected, plain)
    pipeline.transformer.disable_cache()
    whole, _ = blocks_gb(pipeline.transformer)
    if before:
        pipeline.transformer.enable_cache(cache)
    streaming.stream_blocks(pipeline.transformer, whole / 2)
    if not before:
        pipeline.transformer.enable_cache(cache)
    assert torch.equal(run(pipeline, "pocket", num_inference_steps=6), expected)
    assert torch.equal(run(pipeline, "pocket", num_inference_steps=6), expected)


def test_blocks_in_lists_of_lists_of_several_kinds():
    """As in Stable Cascade. Nobody calls a list."""
    kinds = (torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model = torch.nn.ModuleList(torch.nn.ModuleList(copy.deepcopy(kinds)) for _ in range(2))
    assert streaming.find_blocks(model) == [block for level in model for block in level]


def test_blocks_of_which_nothing_is_worth_streaming():
    model = torch.nn.Sequential()
    for part in (torch.nn.Linear(64, 64), torch.nn.LayerNorm(2)):
        model.append(torch.nn.ModuleList(copy.deepcopy(part) for _ in range(2)))
    streamed = streaming.stream_blocks(model, 1)
    assert len(streamed.parcels) == 2


def test_a_list_that_the_model_writes_into():
    """The first module that is entered, an encoder, keeps its cache in a list that it is given."""
    vae, clip = tiny_pipelines.build("wan22").vae.eval().to(DEVICE), torch.rand(1, 3, 5, 16, 16).bfloat16().to(DEVICE)
    expected = vae.encode(clip).latent_dist.mean
    streaming.Streamed(vae, streaming.Ring(DEVICE), whole=True)
    assert torch.equal(vae.encode(clip).latent_dist.mean, expected)


# A whole pipeline


@pytest.mark.parametrize(
    "kind, family, changes, steps",
    [
        (StableDiffusionXLPipeline, "sdxl", {}, 1),
        (StableDiffusionXLImg2ImgPipeline, "sdxl", {"strength": 0.6}, 4),  # which leaves nothing of one step
        (PixArtAlphaPipeline, "pixart", {}, 4),  # it takes one step for that of a distilled model
    ],
)
def test_one_step_or_as_few_as_a_pipeline_can_do(kind, family, changes, steps):
    pipeline = kind(**build(family).components)
    call = call_of(family, num_inference_steps=40, **changes)
    if "strength" in changes:
        call = {"prompt": "cat", "image": torch.zeros(1, 3, 32, 32)} | changes
    streaming.try_out(pipeline, call)
    assert pipeline.scheduler.num_inference_steps == steps
    with pytest.raises(ValueError, match="`prompt` has to be of type"):
        streaming.try_out(pipeline, call | {"prompt": 5})


def test_img2img_batches_and_other_sizes():
    pipeline = build("pocket").to(DEVICE)
    image = run(pipeline, "pocket")
    calls = [{"prompt": ["cat", "dog"]}, {"height": 64, "width": 48}, {"num_images_per_prompt": 2}]
    expected = [run(pipeline, "pocket", **changes) for changes in calls]
    other = FluxImg2ImgPipeline.from_pipe(pipeline, dtype=torch.bfloat16)
    expected_other = run(other, "pocket", image=image)
    filled_to(pipeline.to("cpu"), "pocket", 0.2)
    for changes, picture in zip(calls, expected, strict=True):
        assert torch.equal(run(pipeline, "pocket", **changes), picture)
    other = FluxImg2ImgPipeline.from_pipe(pipeline, dtype=torch.bfloat16)
    assert hasattr(pipeline.transformer, "_streamed")
    assert torch.equal(run(other, "pocket", image=image), expected_other)


def test_embeddings_computed_ahead_and_text_encoders_of_none():
    pipeline = build("pocket")
    embeddings, pooled, _ = pipeline.encode_prompt("cat", "cat", max_sequence_length=16)
    parts = pipeline.components | dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    bare = type(pipeline)(**parts).to(DEVICE)
    bare.set_progress_bar_config(disable=True)
    changes = {"prompt": None, "prompt_embeds": embeddings.to(DEVICE), "pooled_prompt_embeds": pooled.to(DEVICE)}
    expected = run(bare, "pocket", **changes)
    streaming.fill_card(bare.to("cpu"), 50, **call_of("pocket", **changes))
    assert torch.equal(run(bare, "pocket", **changes), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_call_stopped_in_the_middle(error, monkeypatch):
    """In a block, between blocks and within the copying: the next call draws as before, and the model can be saved."""
    pipeline = build("pocket").to(DEVICE)
    expected, weights = run(pipeline, "pocket"), copy.deepcopy(pipeline.transformer.to("cpu").state_dict())
    filled_to(pipeline.to("cpu"), "pocket", 0.2)
    transformer = pipeline.transformer
    places = [
        (transformer.single_transformer_blocks[1].attn, "forward"),
        (transformer.norm_out, "forward"),
        (transformer._streamed.ring, "give_back"),
        (transformer._streamed.ring, "copy"),
        (transformer._streamed.ring, "run_ahead"),
        (pipeline.vae.decoder, "forward"),
        (streaming.Parcel, "point"),
    ]
    for owner, name in places:
        for number in (1, 4):
            calls = iter(range(1, 10_000))
            original = getattr(owner, name)

            def fail(*arguments, original=original, calls=calls, number=number, **keywords):
                if next(calls) == number:
                    raise error("stopped here")
                return original(*arguments, **keywords)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                try:
                    run(pipeline, "pocket")
                except error:
                    pass
            saved = transformer.state_dict()
            assert all(torch.equal(saved[key].cpu(), tensor) for key, tensor in weights.items())
            assert torch.equal(run(pipeline, "pocket"), expected), (owner, name)


def test_a_vae_that_is_upcast_in_each_call():
    """As SDXL in float16 does: it still comes when it is called."""
    pipeline = build("sdxl")
    for model in modules_of(pipeline).values():
        model.to(torch.float16)
    expected = run(pipeline.to(DEVICE), "sdxl")
    filled = filled_to(pipeline.to("cpu"), "sdxl", 0.2)
    for _ in range(2):
        assert torch.equal(run(pipeline, "sdxl"), expected)
        assert hasattr(pipeline.vae, "_streamed") and pipeline.vae.dtype == torch.float16
    filled.remove()
    assert not hasattr(pipeline.vae, "_streamed")
    streamed = streaming.stream_blocks(pipeline.unet, 1)  # all of it stays, and there is no ring
    pipeline.unet.to(torch.float32)
    assert pipeline.unet._streamed is streamed and pipeline.unet.dtype == torch.float32
    for parcel in streamed.parcels:
        assert parcel.host is None and all(tensor.dtype == torch.float32 for tensor in parcel.tensors)
    streamed.remove()
    streamed = streaming.stream_blocks(pipeline.unet, 0.0015)
    pipeline.unet.to(torch.bfloat16)  # here it begins again
    assert pipeline.unet._streamed is streamed and streamed.ring.size > 0 and pipeline.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(("limit_gb", "begins"), [(50, 0), (None, 2)])
def test_a_vae_that_stays_is_upcast_where_it_is(limit_gb, begins, monkeypatch):
    """Once there and once back in each call: packing and page-locking it again would take longer than to decode."""
    pipeline = build("sdxl")
    for model in modules_of(pipeline).values():
        model.to(torch.float16)
    expected = run(pipeline.to(DEVICE), "sdxl")
    pipeline.to("cpu")
    filled = (
        filled_to(pipeline, "sdxl", 0.2)
        if limit_gb is None
        else streaming.fill_card(pipeline, limit_gb, **call_of("sdxl"))
    )
    run(pipeline, "sdxl")
    begun, begin = [], streaming.Streamed.__init__
    monkeypatch.setattr(streaming.Streamed, "__init__", lambda *arguments: (begun.append(1), begin(*arguments))[1])
    assert torch.equal(run(pipeline, "sdxl"), expected)
    assert len(begun) == begins and filled.parts["vae"] is pipeline.vae._streamed
    assert (filled.parts["vae"].rest.host is None) == (limit_gb is not None)
    filled.remove()
    assert {tensor.device.type for tensor in pipeline.vae.parameters()} == {"cpu"}


def test_tiles_of_a_vae_that_comes_and_goes():
    """Wan's pipeline asks its VAE where the latents belong, and each tile enters the VAE by another module."""
    pipeline = build("wan22")
    pipeline.vae.enable_tiling(*[16] * 4)
    expected = run(pipeline.to(DEVICE), "wan22")
    filled = filled_to(pipeline.to("cpu"), "wan22", 0.2)
    assert filled.parts["vae"].rest.host is not None
    assert {part.model.device.type for part in filled.parts.values() if part.whole} == {DEVICE.type}
    assert torch.equal(run(pipeline, "wan22"), expected)


@pytest.mark.parametrize("family", ["pocket", "wan22", "pixart"])
def test_blocks_that_stay_for_the_steps_only(family, monkeypatch):
    """They use the room that text encoders and VAE need before and after, and no more than the limit is ever there."""
    pipeline = build(family)
    expected = run(pipeline.to(DEVICE), family)
    filled = filled_to(pipeline.to("cpu"), family, 0.5)
    parts = {name: part for name, part in filled.parts.items()}
    ring = parts["vae"].ring
    denoisers = [part for part in parts.values() if isinstance(part.model, ModelMixin) and not part.whole]
    guests = denoisers[0].guests
    planned = bool(guests)
    if not planned:  # a VAE below the size of a block, or a GPU, where these tests count nothing beside the weights
        assert denoisers[-1].keep(1e8, as_guests=True) > 0
    assert guests and all(part.guests is guests for part in denoisers)
    there, receive = [], ring.receive

    def receive_and_count(parcels):
        receive(parcels)
        parcels = [parcel for part in parts.values() for parcel in (*part.parcels, part.rest)]
        assert all(parcel.here == (ring.guests is guests) for parcel in guests)
        there.append((ring.guests is guests, sum(parcel.bytes for parcel in parcels if parcel.here) + ring.size))

    monkeypatch.setattr(ring, "receive", receive_and_count)
    for _ in range(2):
        assert torch.equal(run(pipeline, family), expected)
    assert [is_step for is_step, _ in there].count(True) == 2  # once a call, not once a step
    if planned:
        assert max(taken for _, taken in there) <= filled.expected_gb * 1e9 + 1
    denoisers[0].model._streamed.remove()
    assert all(parcel.host is not None and not parcel.here for parcel in guests)
    assert DEVICE.type == "cuda" or planned == (family != "wan22")
    assert torch.equal(run(pipeline.to(DEVICE), family), expected)


def test_two_pipelines_in_a_process():
    families = ("pocket", "qwen-image")
    pipelines = [build(family).to(DEVICE) for family in families]
    expected = [run(*pair) for pair in zip(pipelines, families, strict=True)]
    fills = [filled_to(p.to("cpu"), family, 0.2) for p, family in zip(pipelines, families, strict=True)]
    for _ in range(2):
        for pair, picture in zip(zip(pipelines, families, strict=True), expected, strict=True):
            assert torch.equal(run(*pair), picture)
    fills[0].remove()
    assert torch.equal(run(pipelines[1], families[1]), expected[1])


@pytest.mark.parametrize("technique", ["to", "model offload", "sequential offload", "group offload after remove"])
def test_switching_to_another_technique(technique):
    pipeline = build("pocket").to(DEVICE)
    expected = run(pipeline, "pocket")
    filled = filled_to(pipeline.to("cpu"), "pocket", 0.2)
    run(pipeline, "pocket")
    if technique == "to":
        pipeline.to(DEVICE)
        assert {p.device.type for part in modules_of(pipeline).values() for p in part.parameters()} == {DEVICE.type}
    elif technique == "model offload":
        pipeline.enable_model_cpu_offload(device=DEVICE.type)
    elif technique == "sequential offload":
        pipeline.enable_sequential_cpu_offload(device=DEVICE.type)
        cpu_backend.fix_sequential_offload(pipeline)
    else:
        filled.remove()
        pipeline.enable_group_offload(DEVICE, offload_type="leaf_level")
    if DEVICE.type == "cpu" and technique != "group offload after remove":
        # The weights are where `.to` sends them, so the streaming goes on.
        if technique != "to":
            with pytest.raises(RuntimeError, match="choose one of the two"):
                run(pipeline, "pocket")
            return
    else:
        assert not hasattr(pipeline.transformer, "_streamed")
    assert torch.equal(run(pipeline, "pocket"), expected)


def test_what_cannot_be_done_is_said():
    pipeline = build("pocket")
    transformer = pipeline.transformer
    whole, largest = blocks_gb(transformer)
    with pytest.raises(ValueError, match=r"The largest block takes .* MB: give at least that"):
        streaming.stream_blocks(transformer, largest / 2)
    with pytest.raises(ValueError, match="A Linear has no repeated blocks to stream"):
        streaming.stream_blocks(torch.nn.Linear(2, 2), 1)
    streamed = streaming.stream_blocks(transformer, whole / 2)
    with pytest.raises(ValueError, match="This FluxTransformer2DModel is offloaded already"):
        streaming.stream_blocks(transformer, whole / 2)
    with pytest.raises(TypeError, match=r"end that first with `remove\(\)`"):
        copy.deepcopy(transformer)
    transformer.enable_group_offload(DEVICE, offload_type="leaf_level")
    with pytest.raises(RuntimeError, match="choose one of the two"):
        run(pipeline, "pocket")
    streamed.remove()
    with pytest.raises(ValueError, match="is offloaded already"):
        streaming.fill_card(pipeline, 1, **call_of("pocket"))
    assert not any(hasattr(part, "_streamed") for part in modules_of(pipeline).values())
    pipeline = build("pocket")
    with pytest.raises(
        MemoryError, match="With every block streamed a call takes .* MB, and the limit is 0.10 MB: draw smaller"
    ):
        streaming.fill_card(pipeline, 0.0001, **call_of("pocket"))
    assert not any(hasattr(part, "_streamed") for part in modules_of(pipeline).values())
    if DEVICE.type == "cpu":
        del pipeline.vae.use_tiling  # as with a VAE that knows no tiles; on a GPU it decodes before the end
    with pytest.raises(MemoryError, match="draw smaller"):
        streaming.fill_card(pipeline, 0.0001, **call_of("pocket"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["pocket", "nf4"])
def test_a_file_of_weights_is_let_go_as_soon_as_its_blocks_are_copied(family, tmp_path, monkeypatch):
    """A mapped file counts as host memory: all files beside all copies would be twice the weights."""
    saved = build(family).transformer
    blocks = len(streaming.find_blocks(saved))
    size = sum(tensor.nbytes for tensor in streaming.tensors_of(saved))
    saved.save_pretrained(tmp_path, max_shard_size=models.find_file_size(saved, smallest=size // 8))
    del saved
    model = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    files, mapped, pack = len(list(tmp_path.glob("*.safetensors"))), [], streaming.Parcel.pack

    def pack_and_count(parcel):
        pack(parcel)
        mapped.append(len({line.split()[-1] for line in open("/proc/self/maps") if str(tmp_path) in line}))

    monkeypatch.setattr(streaming.Parcel, "pack", pack_and_count)
    streaming.stream_blocks(model, 1, DEVICE)
    assert files > 5 and mapped[0] == files
    assert mapped[blocks + 1] == 0 and mapped[blocks // 2] <= files // 2 + 1


def test_too_little_host_memory(monkeypatch):
    pipeline = build("pocket")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 10})())
    pipeline.transformer.to("meta")
    with pytest.raises(MemoryError, match="are to move to host memory, where less is free"):
        streaming.stream_blocks(pipeline.transformer, 1)


def test_a_weight_that_two_blocks_share_stays_and_so_do_buffers():
    model = torch.nn.Module()
    model.embedding = torch.nn.Linear(64, 64)
    model.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
    model.layers[1].weight = model.layers[0].weight
    model.layers[0].register_buffer("scale", torch.ones(64))
    streamed = streaming.stream_blocks(model, 1)
    assert any(tensor is model.layers[0].weight for tensor in streamed.rest.tensors)
    assert [len(parcel.tensors) for parcel in streamed.parcels] == [1, 1]  # the biases


def test_eight_bit_weights_are_refused():
    from bitsandbytes.nn import Int8Params

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
    model.layers[0].weight = Int8Params(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="Int8Params weights cannot be streamed: load in bfloat16, or in nf4"):
        streaming.stream_blocks(model, 1)


def test_saving_while_streamed(tmp_path):
    pipeline = build("pocket")
    weights = copy.deepcopy(pipeline.transformer.state_dict())
    filled_to(pipeline, "pocket", 0.2)
    run(pipeline, "pocket")
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = again.transformer.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())
    assert type(again.transformer) is type(build("pocket").transformer)


def test_nothing_grows_with_calls_and_nothing_is_left():
    pipeline = build("sd3")
    filled_to(pipeline, "sd3", 0.2)
    sizes = []
    for number in range(50):
        run(pipeline, "sd3", num_inference_steps=1)
        if number in (9, 49):
            gc.collect()
            sizes.append((len(gc.get_objects()), psutil.Process().memory_info().rss))
    (objects, rss), (objects_after, rss_after) = sizes
    assert objects_after - objects < 500 and rss_after - rss < 20e6
    ring = pipeline.transformer._streamed.ring
    assert len(ring.queue) + len(ring.used) < 100
    left = weakref.ref(pipeline.transformer._streamed.parcels[0])
    del pipeline, ring
    gc.collect()
    assert left() is None


def test_a_copy_of_the_file_alone(tmp_path):
    """It needs nothing else of this project."""
    (tmp_path / "streaming.py").write_text(open(streaming.__file__, encoding="utf-8").read(), encoding="utf-8")
    code = "import streaming, sys; print(any(name.split('.')[0] == 'helpers' for name in sys.modules))"
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != str(PACKAGE_ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="page-locking needs CUDA")
def test_memory_that_cannot_be_page_locked():
    pipeline = build("pocket").to(DEVICE)
    expected = run(pipeline, "pocket")
    real = torch.cuda.cudart().cudaHostRegister
    fake = type("", (), {"cudaHostRegister": lambda self, address, size, flags: real(address, 1 << 60, flags)})()
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="page-locks no more host memory"):
        patch.setattr(torch.cuda, "cudart", lambda: fake)
        streaming.stream_blocks(pipeline.transformer, blocks_gb(pipeline.transformer)[0] / 2)
    assert torch.equal(run(pipeline, "pocket"), expected)


@pytest.fixture
def poisoned(monkeypatch):
    """Weights that wait on the host are nonsense until they are brought to the card, as if the two were one device."""
    pack = streaming.Parcel.pack

    def leave(parcel):
        parcel.here = parcel.host is None
        if parcel.homes is not None:
            parcel.nonsense = torch.full_like(parcel.host, 255)
            parcel.point(parcel.views(parcel.nonsense))

    def pack_all_but_nonsense(parcel):
        if getattr(parcel, "nonsense", None) is not None:
            parcel.point(parcel.homes)
            parcel.nonsense = None
        pack(parcel)

    monkeypatch.setattr(streaming.Parcel, "leave", leave)
    monkeypatch.setattr(streaming.Parcel, "pack", pack_all_but_nonsense)


@pytest.mark.parametrize("family", [*tiny_pipelines.FAMILIES, "nf4"])
def test_no_weight_is_used_before_it_is_brought(family, poisoned):
    """On a CPU nothing else would tell: there the host's copy does as well."""
    pipeline = build(family)
    expected = run(pipeline.to(DEVICE), family)
    filled = filled_to(pipeline.to("cpu"), family, 0.2)
    for part in filled.parts.values():
        for parcel in (*part.parcels, part.rest):
            parcel.leave()
    assert torch.equal(run(pipeline, family), expected)
    assert torch.equal(run(pipeline, family), expected)

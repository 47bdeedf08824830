"""Lesson 3: the checks of its exercises, its table of the order of things, and the symptoms of "When it goes wrong".

Each symptom is provoked here, with the text that the lesson quotes, and the remedy helps. An illegal memory access,
CUDA graphs and streams need a GPU: for those the lesson cites measurements and issues.
"""

import copy
import re

import conftest
import lessons
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FluxImg2ImgPipeline, WanPipeline
from diffusers.hooks import group_offloading
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from helpers.checkpoints import PACKAGE_ROOT
from helpers.residency import record_residency
from helpers.streaming import fill_card

CELLS = lessons.sources("03_group_offload_video")
TEXT = " ".join(" ".join(CELLS.values()).split())
CPU = torch.device("cpu")
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
FIRST_BLOCK = FirstBlockCacheConfig(threshold=10.0)  # so high that every step after the first is skipped
ONE_STEP = {"num_inference_steps": 1}

# Here the CPU stands for the card: both are one place, and no kernel needs to know it.
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU shows")


@pytest.fixture(scope="module")
def lesson():
    """The names that the lesson's own cells define: those that load, draw and count, and the exercises."""
    names = {"__name__": "lesson"}
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(cache_size_limit=8):
        patch.delenv("TUTORIAL_MODELS", raising=False)
        patch.chdir(PACKAGE_ROOT / "notebooks")
        for name in ("02", "03", "05", "09", "10", "15", "17", "27", "53", "54", "34", "60", "72"):
            exec(CELLS[f"cell-{name}"].replace("\n\n\nmoves(leaves)", ""), names)
        names["pipeline"] = names["load"]()
        exec(CELLS["cell-30"], names)
        for name in ("exercise-1", "exercise-2"):
            exec(CELLS[name], names)
        yield names
    torch.compiler.reset()


@pytest.fixture
def flux():
    pipeline = conftest.build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    torch.compiler.reset()


def onloads(pipeline, component, **changes):
    """How often a piece of a component is brought to the card in a call."""
    with record_residency(pipeline) as events:
        conftest.draw(pipeline, **changes)
    return sum(event.onloads for event in events if event.component == component)


def solution(exercise):
    return lessons.solution(CELLS[f"solution-{exercise}"])


# Exercises


def test_first_exercise(lesson):
    check = lesson["check_tokens"]
    assert check(None) == "Give a number of tokens."
    assert check(int(re.match(r"[\d,]+", solution(1))[0].replace(",", ""))) == "Right."
    assert check(1000).startswith("Too few: 3.7 ms of compute cannot hide 7.0 ms of copying")
    assert check(1940).startswith("It hides, but 7.5 ms")  # what one gets without attention
    assert 2 * 1940 * (6 * lesson["matrix"] + lesson["ffn"]) / 165e12 == pytest.approx(7.03e-3, rel=0.01)


def test_second_exercise(lesson):
    check = lesson["check_prepare"]
    assert check(None) == "Write a function that takes a pipeline."
    exec(re.search(r"<pre>(.*?)</pre>", solution(2), re.DOTALL)[1], lesson)
    assert check(lesson["prepare"]) == "Right."
    assert check(lambda pipeline: lesson["compile_blocks"](pipeline, backend="eager")).startswith("Nothing moves")
    assert check(lesson["offload_blocks"]) == "Nothing is compiled."

    def hooks_inside(pipeline):
        lesson["offload_blocks"](pipeline)
        for block in pipeline.transformer.blocks:
            block.forward = torch.compile(block.forward, backend="eager")

    assert check(hooks_inside).endswith("breaks: a hook is inside of what you compile.")


# The order of things: graphs and breaks


def fill(pipeline, lesson):
    """Streamed within the lowest limit and a little more, so that most blocks do not stay."""
    if "least" not in lesson:
        lesson["least"] = fill_card(lesson["load"](), **lesson["checkpoint"].call_arguments).least_gb
    filled = fill_card(pipeline, lesson["least"] + 0.0008, **lesson["checkpoint"].call_arguments)
    assert any(parcel.host is not None for parcel in filled.parts["transformer"].parcels)


def whole(pipeline):
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def at_component(lesson):
    pipeline = lesson["load"]()
    pipeline.enable_model_cpu_offload(device="cpu")
    whole(pipeline)
    return pipeline


def at_blocks(lesson):
    pipeline = lesson["load"](skip=list(lesson["outside"]))
    lesson["compile_blocks"](pipeline, backend="eager")
    lesson["offload_blocks"](pipeline)
    return pipeline


def streamed(lesson):
    pipeline = lesson["load"]()
    whole(pipeline)
    fill(pipeline, lesson)
    return pipeline


def streamed_first(lesson):
    pipeline = lesson["load"]()
    fill(pipeline, lesson)
    whole(pipeline)
    return pipeline


@on_a_cpu
@pytest.mark.parametrize("prepare", [at_component, at_blocks, streamed, streamed_first])
def test_one_graph_and_no_break(prepare, lesson):
    pipeline = prepare(lesson)
    assert lesson["count"](pipeline) == {"graphs": 1, "breaks": 0}
    assert TEXT.count("| 1 graph, 0 breaks |") == 3


@on_a_cpu  # with a stream it read an illegal address on an H200, which ends the process
def test_regional_compilation_after_block_offload_has_the_hooks_inside(lesson):
    pipeline = lesson["load"](skip=list(lesson["outside"]))
    lesson["offload_blocks"](pipeline)
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    assert lesson["count"](pipeline)["breaks"] > 0


# Traps of the sections


def test_diffusion_pipeline_replaces_a_transformer_that_is_passed(lesson, tmp_path):
    lesson["load"]().save_pretrained(tmp_path)
    own = lesson["load"]().transformer
    settings = {"dtype": torch.bfloat16, "device_map": "cpu"}
    assert DiffusionPipeline.from_pretrained(tmp_path, transformer=None, **settings).transformer is not None
    assert DiffusionPipeline.from_pretrained(tmp_path, transformer=own, dtype=torch.bfloat16).transformer is not own
    assert WanPipeline.from_pretrained(tmp_path, transformer=own, dtype=torch.bfloat16).transformer is own
    assert WanPipeline.from_pretrained(tmp_path, transformer=None, **settings).transformer is None


@on_a_cpu
def test_text_encoder_alone(lesson):
    pipeline = lesson["load"]()
    pipeline.enable_group_offload(CPU, offload_type="leaf_level", exclude_modules=["transformer", "vae"])
    with record_residency(pipeline) as events:
        pass
    assert {event.component for event in events} == {"transformer", "vae"}
    assert 'exclude_modules=["transformer", "vae"]' in TEXT


@on_a_cpu
def test_one_line_for_the_pipeline_does_the_three_calls(lesson):
    by_hand, at_once = lesson["load"](), lesson["load"]()
    exec(CELLS["cell-22"] + "\n" + CELLS["cell-24"], lesson | {"pipeline": by_hand})
    at_once.enable_group_offload(CPU, offload_type="leaf_level")
    counts = []
    for pipeline in (by_hand, at_once):
        with record_residency(pipeline) as events:
            lesson["draw"](pipeline, **ONE_STEP)
        counts.append(lesson["moves"](events).to_dict())
    assert counts[0] == counts[1]


# When it goes wrong


def quoted(symptom):
    """The text stands in the lesson's table."""
    assert symptom in CELLS["trouble"], symptom
    return re.escape(symptom)


def test_group_offload_cannot_be_switched_off(flux):
    flux.enable_group_offload(CPU, offload_type="leaf_level")
    symptom = quoted("pipeline that contains components with group offloading enabled")
    with pytest.raises(ValueError, match=symptom):
        flux.enable_model_cpu_offload(device="cpu")
    flux.remove_all_hooks()
    with pytest.raises(ValueError, match=symptom):
        flux.enable_model_cpu_offload(device="cpu")
    leaves = onloads(flux, "transformer")
    flux.transformer.enable_group_offload(CPU, **BLOCKS)  # the hooks of the leaves are still there
    flux.transformer.to(CPU)
    assert onloads(flux, "transformer") > leaves > 100


@on_a_cpu
def test_the_three_hooks_can_be_taken_off(flux):
    flux.enable_group_offload(CPU, offload_type="leaf_level")
    (lines,) = re.findall(r"```python\n(.*?)```", CELLS["trouble"], re.DOTALL)
    for component in (flux.transformer, flux.vae, flux.text_encoder, flux.text_encoder_2):
        exec(lines, {"component": component})
        hooks = [part._diffusers_hook.hooks for part in component.modules() if hasattr(part, "_diffusers_hook")]
        assert not any(hooks)
    flux.enable_model_cpu_offload(device="cpu")
    assert onloads(flux, "transformer") == 1


def test_streams_have_the_three_hooks_that_the_lines_remove(flux):
    """A CPU has no stream. Whatever is taken for one shows which hooks diffusers sets for it."""
    config = group_offloading.GroupOffloadingConfig(CPU, CPU, "leaf_level", True, True, True, stream=object())
    group_offloading._apply_group_offloading_leaf_level(flux.transformer, config)
    names = {
        name
        for part in flux.transformer.modules()
        if hasattr(part, "_diffusers_hook")
        for name in part._diffusers_hook.hooks
    }
    (lines,) = re.findall(r"```python\n(.*?)```", CELLS["trouble"], re.DOTALL)
    assert names == {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"}
    exec(lines, {"component": flux.transformer})
    assert not any(
        part._diffusers_hook.hooks for part in flux.transformer.modules() if hasattr(part, "_diffusers_hook")
    )


def test_a_cache_needs_named_calls(flux):
    flux.transformer.enable_cache(FIRST_BLOCK)
    conftest.draw(flux)  # text to image names its calls
    image_to_image = FluxImg2ImgPipeline(**flux.components)
    image_to_image.set_progress_bar_config(disable=True)
    picture = {"image": np.zeros((1, 32, 32, 3), dtype=np.float32), "strength": 1.0}
    with pytest.raises(ValueError, match=quoted("No cache context is set")):
        image_to_image(**conftest.CALL, **picture)
    flux.transformer.disable_cache()
    image_to_image(**conftest.CALL, **picture)


@pytest.mark.parametrize("hook", ["cache", "group offload"])
def test_a_hook_in_a_full_graph_fails(hook, flux):
    if hook == "cache":
        flux.transformer.enable_cache(FIRST_BLOCK)
        flux.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        flux.transformer.enable_group_offload(CPU, **BLOCKS)
        flux.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match=quoted("Skip inlining")):
        conftest.draw(flux, **ONE_STEP)


def test_blocks_compiled_inside_go_with_a_cache(flux):
    counters.clear()
    for block in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    flux.transformer.enable_cache(FIRST_BLOCK)
    conftest.draw(flux)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]  # two kinds of blocks


def test_a_cache_before_the_offload_copies_skipped_blocks(flux):
    other = copy.deepcopy(flux)
    flux.transformer.enable_cache(FIRST_BLOCK)
    flux.transformer.enable_group_offload(CPU, **BLOCKS)
    other.transformer.enable_group_offload(CPU, **BLOCKS)
    other.transformer.enable_cache(FIRST_BLOCK)
    assert onloads(other, "transformer", num_inference_steps=6) < 0.6 * onloads(
        flux, "transformer", num_inference_steps=6
    )


@on_a_cpu
def test_wan_needs_negative_embeddings_too(lesson):
    pipeline, call = lesson["load"](), lesson["checkpoint"].call_arguments
    names = {name: call[name] for name in ("prompt", "negative_prompt", "max_sequence_length")}
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(**names, device=CPU)
    pipeline.text_encoder = pipeline.tokenizer = None
    changes = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, **ONE_STEP}
    with pytest.raises(AttributeError, match=quoted("'NoneType' object has no attribute 'dtype'")):
        lesson["draw"](pipeline, **changes)
    lesson["draw"](pipeline, **changes, negative_prompt_embeds=negative)


@on_a_cpu
def test_groups_on_disk_are_not_written_again(lesson, tmp_path):
    settings = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    first = DiffusionPipeline.from_pretrained(lesson["checkpoint"].path, dtype=torch.bfloat16).transformer
    first.enable_group_offload(CPU, **settings)
    pipeline = lesson["load"]()
    pipeline.transformer.enable_group_offload(CPU, **settings)
    with pytest.raises(Exception, match="shape|size|Size|dimension"):
        lesson["draw"](pipeline, **ONE_STEP)
    assert "a shape error or black frames with `offload_to_disk_path`" in TEXT


def test_peft_and_citations_stand_in_the_table():
    quoted("PEFT backend is required")
    for number in (12096, 11966, 7420):
        assert f"https://github.com/huggingface/diffusers/issues/{number}" in TEXT
    assert "https://github.com/huggingface/diffusers/pull/12747" in TEXT

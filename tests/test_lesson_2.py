"""Lesson 2: its checks accept the solutions and say what is wrong with other answers; its symptoms come about."""

import html
import itertools
import re

import lessons
import pytest
import torch
from conftest import draw
from diffusers import DiffusionPipeline, FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline
from diffusers.hooks import apply_group_offloading
from PIL import Image
from torch._dynamo.utils import counters

from benchmarks.strategies import put_quant_states
from helpers import devices, models, quality
from helpers.checkpoints import PACKAGE_ROOT
from helpers.residency import record_residency
from helpers.streaming import stream_blocks

DEVICE = devices.accelerator()
CELLS = lessons.read("02_model_cpu_offload")
TABLE = next(cell["source"] for cell in CELLS if "When it goes wrong" in cell["source"])


def offload(pipeline):
    """Model offload, as the lesson enables it."""
    pipeline.enable_model_cpu_offload(device=DEVICE)
    return pipeline


def at_once(events):
    """The pairs of components of which stays overlap."""
    return {
        frozenset((one.component, other.component))
        for one, other in itertools.combinations(events, 2)
        if min(one.offload_s, other.offload_s) > max(one.onload_s, other.onload_s)
    }


# The exercises


@pytest.fixture
def lesson(nf4_pipeline, tmp_path):
    """The checks of the exercises, and what they use, with the tiny model; the solutions as text."""
    nf4_pipeline.save_pretrained(tmp_path)
    arguments = {"prompt": "cat face on a yellow background", "num_inference_steps": 2, "max_sequence_length": 16}

    class Checkpoint:
        prompt, max_sequence_length = arguments["prompt"], 16
        call_arguments = arguments | {"height": 32, "width": 32}

    def saved_then_offload():
        return offload(DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu"))

    pipeline = saved_then_offload()
    with record_residency(pipeline) as offloaded:
        draw(pipeline)
    names = globals() | {"checkpoint": Checkpoint, "saved_then_offload": saved_then_offload, "offloaded": offloaded}
    sources = [cell["source"] for cell in CELLS if cell["cell_type"] == "code"]
    for source in sources:
        if re.match(r"def check_\w+\(answer", source):
            exec(source, names)
    return names


def solution(number):
    """The code of a solution."""
    text = "\n".join(cell["source"] for cell in CELLS if cell["cell_type"] == "markdown")
    folded = re.findall(r"<details><summary>Solution</summary>\s*(.*?)</details>", text, re.DOTALL)
    return html.unescape(re.search(r"<code>(.*?)</code>", folded[number - 1], re.DOTALL)[1])


def test_first_exercise(lesson):
    check, once = lesson["check_bytes"], sum(event.moved_bytes for event in lesson["offloaded"]) / 1e6
    assert check(None) == "Give two numbers of MB: (in one call, in three calls)."
    assert check((once, 3 * once)) == "Right."
    assert check((3 * once, 3 * once)).startswith("In one call: a batch goes through each component together.")
    assert check((once, once)).startswith("In three calls: nothing is kept")
    pipeline = lesson["saved_then_offload"]()
    with record_residency(pipeline) as batch:
        draw(pipeline, prompt=["cat", "dog", "face"])
    assert sum(event.moved_bytes for event in batch) / 1e6 == pytest.approx(once)
    one, three = (float(number) for number in re.findall(r"[\d.]+", solution(1)))
    table = next(cell for cell in CELLS if "largest component" in cell["source"])["outputs"]
    shown = re.findall(r"<td>([\d.]+)</td>", "".join(table[-1]["data"]["text/html"]))
    assert (one, three) == pytest.approx((sum(map(float, shown)), 3 * sum(map(float, shown))), rel=0.002)


def test_second_exercise(lesson):
    check, names = lesson["check_peaks"], {}
    exec(solution(2), names)
    answer = names["answer"]
    assert check(answer) == "Right."
    assert check(None).startswith("Give a dictionary")
    assert check(answer | {"offload after loading": 12}).startswith("offload after loading: both quantized")
    assert check(answer | {"encode, free, then load": 17}).startswith("encode, free, then load: each large")
    assert check(answer | {"saved nf4 on the CPU, offload": 0}).startswith("saved nf4 on the CPU, offload: loading")


def test_third_exercise(lesson):
    check = lesson["check_seeds"]
    assert check(None).startswith("Write a function")
    exec(solution(3), lesson)
    answer = lesson["answer"]
    assert check(answer) == "Right."

    def one_by_one(pipeline, seeds):
        return [answer(pipeline, [seed])[0] for seed in seeds]

    assert check(one_by_one).startswith("T5 was copied 2 times")
    assert check(lambda pipeline, seeds: answer(pipeline, [seed + 1 for seed in seeds])).startswith(
        "The picture of seed 1 is not the one"
    )


# The order of things


def count(pipeline):
    """Graphs and breaks that dynamo records in one step."""
    torch.compiler.reset()
    counters.clear()
    draw(pipeline, num_inference_steps=1)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_compiled_and_used_before_offloading_is_recorded_twice(bf16_pipeline):
    bf16_pipeline.to(DEVICE).transformer.compile(backend="eager")
    assert count(bf16_pipeline) == (1, 0)
    draw(offload(bf16_pipeline), num_inference_steps=1)
    assert counters["stats"]["unique_graphs"] == 2
    assert count(bf16_pipeline) == (1, 2)  # offloaded first


def test_the_order_does_not_matter_for_compiled_blocks(bf16_pipeline):
    bf16_pipeline.to(DEVICE).transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    graphs, breaks = count(bf16_pipeline)
    draw(offload(bf16_pipeline), num_inference_steps=1)
    assert (counters["stats"]["unique_graphs"], breaks) == (graphs, 0)


def test_streaming_breaks_no_graph(bf16_pipeline):
    transformer = bf16_pipeline.to(DEVICE).transformer
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    before = count(bf16_pipeline)
    stream_blocks(transformer, 0.001)
    assert count(bf16_pipeline) == before and before[1] == 0


def test_leaves_need_more_than_eight_versions(bf16_pipeline):
    others = ["text_encoder", "text_encoder_2", "vae"]
    bf16_pipeline.enable_group_offload(DEVICE, offload_type="leaf_level", exclude_modules=others)
    bf16_pipeline.transformer.compile(backend="eager")
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(cache_size_limit=8, fail_on_recompile_limit_hit=True),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        draw(bf16_pipeline, num_inference_steps=1)


# The symptoms


def symptom(text):
    """Check that the table names this symptom."""
    assert text in TABLE
    return text


def test_the_full_graph_under_offloading_fails(bf16_pipeline):
    offload(bf16_pipeline).transformer.compile(fullgraph=True, backend="eager")
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        draw(bf16_pipeline, num_inference_steps=1)
    assert symptom("Skip calling torch.compiler.disable()d function") in str(caught.value).replace("`", "")


@pytest.mark.parametrize("freed", [False, True])
def test_after_an_interrupt_the_component_stays(nf4_pipeline, freed):
    assert symptom("maybe_free_model_hooks")

    def interrupt(*_):
        raise KeyboardInterrupt

    pipeline = offload(nf4_pipeline)
    with record_residency(pipeline) as events:
        with pytest.raises(KeyboardInterrupt):
            draw(pipeline, callback_on_step_end=interrupt)
        if freed:
            pipeline.maybe_free_model_hooks()
        draw(pipeline)
    assert (frozenset(("transformer", "text_encoder_2")) in at_once(events)) is not freed


def test_model_offload_is_one_at_a_time(nf4_pipeline):
    pipeline = offload(nf4_pipeline)
    with record_residency(pipeline) as events:
        draw(pipeline)
    assert at_once(events) == set()


def test_but_not_with_img2img(nf4_pipeline):
    assert symptom("img2img")
    pipeline = offload(FluxImg2ImgPipeline.from_pipe(nf4_pipeline, dtype=torch.bfloat16))
    with record_residency(pipeline) as events:
        draw(pipeline, image=Image.new("RGB", (32, 32)), strength=1.0)
    assert frozenset(("transformer", "vae")) in at_once(events)


def test_nor_with_a_controlnet(bf16_pipeline):
    assert symptom("ControlNet")
    parts = bf16_pipeline.components
    parts.pop("image_encoder"), parts.pop("feature_extractor")
    controlnet = FluxControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_single_layers=0, attention_head_dim=32, num_attention_heads=2
    )
    pipeline = offload(FluxControlNetPipeline(**parts, controlnet=controlnet.to(torch.bfloat16)))
    with record_residency(pipeline) as events:
        draw(pipeline, control_image=Image.new("RGB", (32, 32)))
    assert frozenset(("transformer", "controlnet")) in at_once(events)


@pytest.mark.parametrize("sent_back", [False, True])
def test_and_not_with_a_preview(nf4_pipeline, sent_back):
    assert symptom("callback_on_step_end") and symptom('pipeline.vae.to("cpu")')
    pipeline = offload(nf4_pipeline)

    def preview(pipeline, step, timestep, values):
        pipeline.vae.decode(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16, device=DEVICE))
        if sent_back:
            pipeline.vae.to("cpu")
        return values

    with record_residency(pipeline) as events:
        draw(pipeline, callback_on_step_end=preview)
    assert (frozenset(("transformer", "vae")) in at_once(events)) is not sent_back


def test_two_requests_at_a_time_need_two_schedulers(bf16_pipeline):
    pipeline = bf16_pipeline.to(DEVICE)
    expected = draw(pipeline)
    drawn = []

    def nested(other):
        """In the first step of one call, another one draws."""

        def callback(_, step, timestep, values):
            if step == 0:
                drawn.append(draw(other))
            return values

        return callback

    with pytest.raises(IndexError, match=r"index \d+ is out of bounds"):
        draw(pipeline, callback_on_step_end=nested(pipeline))
    assert symptom("is out of bounds")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    other = type(pipeline)(**pipeline.components | {"scheduler": scheduler})
    drawn.append(draw(pipeline, callback_on_step_end=nested(other)))
    assert all(quality.image_distance(picture, expected) == 0 for picture in drawn)


def test_a_weight_and_its_quant_state_in_two_files(nf4_pipeline, tmp_path):
    transformer = nf4_pipeline.transformer
    sizes = range(2_000, 100_000, 100)
    parted = next(size for size in sizes if models.find_file_size(transformer, smallest=size) > size)
    transformer.save_pretrained(tmp_path / "parted", max_shard_size=parted)
    with pytest.raises(ValueError) as caught:
        type(transformer).from_pretrained(tmp_path / "parted", dtype=torch.bfloat16)
    assert all(symptom(text) in str(caught.value) for text in ("Supplied state dict for", "does not contain"))
    assert symptom("max_shard_size")
    transformer.save_pretrained(tmp_path / "whole", max_shard_size=models.find_file_size(transformer, smallest=parted))
    type(transformer).from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)


def test_group_offload_after_model_offload(nf4_pipeline):
    expected = draw(nf4_pipeline.to(DEVICE))
    encoder = offload(nf4_pipeline).text_encoder_2
    how = {"onload_device": DEVICE, "offload_type": "leaf_level"}
    with pytest.raises(ValueError) as caught:
        apply_group_offloading(encoder, **how)
    cell = "Cannot apply group offloading to a module that is already applying an alternative offloading strategy"
    assert symptom(cell) in str(caught.value)
    nf4_pipeline.remove_all_hooks()
    nf4_pipeline.to(DEVICE)
    apply_group_offloading(encoder, **how)
    put_quant_states(encoder, DEVICE)  # group offload took them to the host, and brings the weights alone back
    assert quality.image_distance(draw(nf4_pipeline), expected) == 0


# What to type


def test_the_commands_have_these_options():
    text = "\n".join(cell["source"] for cell in CELLS if cell["cell_type"] == "markdown")
    commands = re.findall(r"^python (programs/\w+\.py) (.*)", text, re.MULTILINE)
    assert [program for program, _ in commands] == ["programs/save_nf4.py", "programs/draw.py"]
    for program, arguments in commands:
        source = (PACKAGE_ROOT / program).read_text(encoding="utf-8")
        assert all(f'add_argument("{option}"' in source for option in re.findall(r"--[\w-]+", arguments))
    assert commands[1][1].split()[0] == commands[0][1].split()[1]  # what the one saves, the other loads

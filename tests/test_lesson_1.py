"""Lesson 1: its exercises tell right answers from wrong ones, and what it says under "When it goes wrong" holds.

Each symptom is provoked, and its text is the one that the lesson's table has.
"""

import math
import os
import re
from functools import partial
from unittest import mock

import lessons
import pipeline_checks as checks
import pytest
import torch
from bitsandbytes import functional as bnb
from conftest import draw, nf4_config
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch._dynamo.utils import counters

from helpers import cpu_backend, devices, quality, records
from helpers.checkpoints import PACKAGE_ROOT

SOURCES = lessons.sources("01_quantize_and_compile")
symptom = partial(lessons.symptom, SOURCES["cell-65"])
RESULTS = PACKAGE_ROOT / "benchmarks/results"


@pytest.fixture
def lesson():
    """The names of the cells of the exercises."""
    cited = records.load_measurements(RESULTS / "flux-full_rtx-4090_cited.json")
    names = {"bnb": bnb, "torch": torch, "device": devices.accelerator(), "cited": cited}
    for cell in ("exercise-1", "exercise-2"):
        exec(SOURCES[cell], names)
    return names


def test_first_exercise(lesson):
    check = lesson["check_bits"]
    assert check(None) == "Give a number of bits."
    assert check(4 + 8 / 64 + 32 / (64 * 256)) == check(4.127) == "Right."
    assert check(4.125).startswith("Too few")  # without the scales of the scales
    assert check(4.5).startswith("Too many")


def test_second_exercise(lesson):
    check = lesson["check_pictures"]
    assert check(None) == "Give a number of pictures."
    assert check(9) == "Right."
    assert check(8) == "Too few: compiled, 8 pictures take 6 s longer."
    assert check(10) == "It pays with fewer."


def test_the_first_picture_that_pays():
    names = {"recorded": {}, "math": math}
    for name, first, later in (("nf4, resident, eager", 6, 5), ("nf4, resident, regional compile", 16, 4)):
        names["recorded"][name] = records.Measurement(name, first_call_s=first, latency_s=later)
    exec(SOURCES["break-even"].partition("\npairs")[0], names)
    # 10 s more at first, 1 s less each: after 11 pictures both took 56 s.
    assert names["pays_from"]("nf4 + regional", "nf4") == 11


@pytest.fixture
def lora(tiny_checkpoint, tmp_path):
    """Writes LoRAs for the tiny transformer, each of its rank, and gives their folders."""

    def write(rank=4):
        pipeline = load(tiny_checkpoint)
        torch.manual_seed(rank)
        settings = {"r": rank, "lora_alpha": rank, "init_lora_weights": False, "target_modules": ["to_q", "to_v"]}
        pipeline.transformer.add_adapter(LoraConfig(**settings))
        layers = get_peft_model_state_dict(pipeline.transformer)
        FluxPipeline.save_lora_weights(tmp_path / f"lora-{rank}", transformer_lora_layers=layers)
        return tmp_path / f"lora-{rank}"

    return write


def load(folder, **changes):
    settings = {"dtype": torch.bfloat16, "quantization_config": nf4_config()} | changes
    pipeline = DiffusionPipeline.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def new_graphs(function) -> int:
    """How many graphs dynamo makes during a call."""
    before = counters["stats"]["unique_graphs"]
    function()
    return counters["stats"]["unique_graphs"] - before


@pytest.fixture
def compiling():
    """Dynamo with nothing recorded; "eager" as the backend records graphs and compiles none, which takes no time."""
    torch.compiler.reset()
    counters.clear()
    yield {"fullgraph": True, "backend": "eager"}
    torch.compiler.reset()


def test_from_pipe_without_a_dtype_changes_both_pipelines(nf4_pipeline):
    before = draw(nf4_pipeline)
    second = FluxImg2ImgPipeline.from_pipe(nf4_pipeline)
    assert nf4_pipeline.vae.dtype == nf4_pipeline.text_encoder.dtype == torch.float32
    assert quality.image_distance(before, draw(nf4_pipeline)) > 0.1  # silently another picture
    message = symptom("Input type (c10::BFloat16) and bias type (float) should be the same")
    with pytest.raises(RuntimeError) as caught:
        second("a cat", image=Image.new("RGB", (32, 32)), num_inference_steps=3, max_sequence_length=16)
    assert message in str(caught.value)


def test_from_pipe_with_a_dtype_changes_nothing(nf4_pipeline):
    before = draw(nf4_pipeline)
    FluxImg2ImgPipeline.from_pipe(nf4_pipeline, dtype=torch.bfloat16)
    assert nf4_pipeline.vae.dtype == torch.bfloat16
    assert quality.image_distance(before, draw(nf4_pipeline)) == 0


def test_a_saved_folder_needs_a_dtype(nf4_pipeline, tmp_path):
    before = draw(nf4_pipeline)
    nf4_pipeline.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        draw(load(tmp_path, dtype=None, quantization_config=None))
    assert symptom("Input type (c10::BFloat16) and bias type (float) should be the same") in str(caught.value)
    assert quality.image_distance(before, draw(load(tmp_path, quantization_config=None))) == 0


def test_a_lora_needs_peft(nf4_pipeline, lora):
    folder = lora()
    with mock.patch("diffusers.loaders.lora_base.USE_PEFT_BACKEND", False):
        with mock.patch("diffusers.loaders.lora_pipeline.USE_PEFT_BACKEND", False, create=True):
            with pytest.raises(ValueError) as caught:
                nf4_pipeline.load_lora_weights(folder)
    assert str(caught.value) == symptom("PEFT backend is required for this method.")


@pytest.mark.filterwarnings("ignore:.*4-bit linear may get different generations")
def test_fusing_a_lora_rounds_anew_and_cannot_be_undone(nf4_pipeline, lora):
    plain = draw(nf4_pipeline)
    nf4_pipeline.load_lora_weights(lora())
    loaded = draw(nf4_pipeline)
    assert quality.image_distance(plain, loaded) > 0.1
    nf4_pipeline.fuse_lora()
    assert quality.image_distance(loaded, draw(nf4_pipeline)) > 0.1
    nf4_pipeline.unfuse_lora()
    assert quality.image_distance(loaded, draw(nf4_pipeline)) > 0.1


def test_a_folder_saved_with_a_lora_does_not_load(nf4_pipeline, lora, tmp_path):
    plain = draw(nf4_pipeline)
    nf4_pipeline.load_lora_weights(lora())
    nf4_pipeline.save_pretrained(tmp_path / "with")
    with pytest.raises(NotImplementedError) as caught:
        load(tmp_path / "with", quantization_config=None)
    assert symptom("Cannot copy out of meta tensor; no data!") in str(caught.value)
    nf4_pipeline.unload_lora_weights()
    nf4_pipeline.save_pretrained(tmp_path / "without")
    assert quality.image_distance(plain, draw(load(tmp_path / "without", quantization_config=None))) == 0


def test_another_batch_size_compiles_again_and_a_third_does_not(nf4_pipeline, compiling):
    nf4_pipeline.transformer.single_transformer_blocks[0].compile(**compiling)  # one block shows it, and takes no time

    def graphs(count):
        return new_graphs(lambda: draw(nf4_pipeline, num_images_per_prompt=count, num_inference_steps=1))

    assert graphs(1) == 1 and graphs(1) == 0
    assert graphs(2) > 0 and graphs(3) == 0


@pytest.mark.parametrize("hotswap", [False, True])
def test_another_rank_compiles_again_unless_it_is_swapped_in(nf4_pipeline, lora, compiling, tiny_checkpoint, hotswap):
    highest, lower = lora(8), lora(4)
    if hotswap:
        nf4_pipeline.enable_lora_hotswap(target_rank=8)
    nf4_pipeline.load_lora_weights(highest, adapter_name="one")
    nf4_pipeline.transformer.single_transformer_blocks[0].compile(**compiling)
    draw(nf4_pipeline)
    if not hotswap:
        nf4_pipeline.unload_lora_weights()
    nf4_pipeline.load_lora_weights(lower, adapter_name="one", hotswap=hotswap)
    assert (new_graphs(lambda: draw(nf4_pipeline)) == 0) == hotswap
    fresh = load(tiny_checkpoint)
    fresh.load_lora_weights(lower)
    assert quality.image_distance(draw(fresh), draw(nf4_pipeline)) < 0.01


def test_two_lines_of_the_guide_change_nothing(nf4_pipeline, compiling):
    """`channels_last`, and `capture_dynamic_output_shape_ops`: one graph without it, as with it in the lesson."""
    before = draw(nf4_pipeline)
    assert all(parameter.dim() != 4 for parameter in nf4_pipeline.transformer.parameters())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        nf4_pipeline.transformer.compile(**compiling)
        assert new_graphs(lambda: draw(nf4_pipeline)) == 1
        assert not counters["graph_break"]
    assert quality.image_distance(before, draw(nf4_pipeline)) == 0


def test_cache_artifacts_carry_what_was_compiled(compiling, tmp_path):
    assert (
        "save_cache_artifacts()" in SOURCES["warm-text"] and "load_cache_artifacts(artifacts)" in SOURCES["warm-text"]
    )

    def compile_in(folder):
        counters.clear()
        torch.compiler.reset()
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / folder)):
            torch.compile(torch.nn.functional.gelu)(torch.ones(64))
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    hits, misses = compile_in("here")
    assert (hits, misses) == (0, 1)
    artifacts, _ = torch.compiler.save_cache_artifacts()
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "there")):
        torch.compiler.load_cache_artifacts(artifacts)
    hits, misses = compile_in("there")
    assert (hits, misses) == (1, 0)


@pytest.mark.parametrize("of_the_guide", [False, True])
def test_the_programs(monkeypatch, tmp_path, of_the_guide):
    """The lesson's own, and the guide's recipe 1: a block with its first line, and the two that compile."""
    code, guide = [block for text in SOURCES.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    if of_the_guide:
        setting, *compiling = [line for line in guide.splitlines() if line]
        own = "pipeline.transformer.compile_repeated_blocks(fullgraph=True)"
        assert own in code
        code = code.replace("\n\npipeline =", f"\n\n{setting}\n\npipeline =").replace(own, "\n".join(compiling))
    small = 'California", height=128, width=128, num_inference_steps=2, max_sequence_length=32)'
    here = {
        '"black-forest-labs/FLUX.1-dev"': repr(str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")),
        '"cuda"': repr(devices.accelerator().type),
        'California")': small,
    }
    for theirs, ours in here.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    cpu_backend.enable()
    monkeypatch.chdir(tmp_path)
    spy = checks.Spy(devices.accelerator())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        pipeline = spy.run(code, monkeypatch)["pipeline"]
        assert torch._dynamo.config.capture_dynamic_output_shape_ops == of_the_guide
    torch.compiler.reset()
    parts = devices.component_modules(pipeline)
    assert checks.left_on_host(pipeline, spy) == set()
    assert checks.unquantized(pipeline.transformer) == []
    assert {name.split(".")[-1] for name in checks.unquantized(pipeline.text_encoder_2)} == {"wo"}
    assert set.union(*map(checks.dtypes, parts.values())) == {torch.bfloat16, torch.uint8}
    assert all(settings.get("fullgraph") for settings in spy.compiled)
    if of_the_guide:
        assert len(spy.compiled) == 1 and spy.compiled[0]["mode"] == "max-autotune"
    else:
        assert len(spy.compiled) == len(checks.blocks(pipeline.transformer))
    assert spy.memory_formats == [torch.channels_last] * of_the_guide

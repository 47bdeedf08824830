"""Lesson 5: its exercises tell right answers from wrong ones, what it works out is right, and its symptoms are real.

What the tests of lessons 1 to 3 provoke already (a LoRA fused or saved; `from_pipe` without a dtype;
model offload after Ctrl-C; a cache with image to image; two requests) is only looked up here, in the lesson's table.
"""

import json
import re
from pathlib import Path

import lessons
import pytest
import save_nf4
import tiny_pipelines
import torch
from conftest import message_of
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline
from huggingface_hub import HfApi, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers import models, tiny_models
from helpers.checkpoints import PACKAGE_ROOT

CELLS = lessons.sources("05_your_own_model")
TEXT = " ".join(" ".join(CELLS.values()).split())


@pytest.fixture(scope="module")
def lesson():
    """The names that the lesson's own cells define; its programs run in this process, which takes less time."""
    names = {"__name__": "lesson"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TUTORIAL_MODELS", raising=False)
        patch.chdir(PACKAGE_ROOT / "notebooks")
        for name in ("imports", "imports-2", "flux", "find", "headers", "linear"):
            exec(CELLS[name], names)
        patch.chdir(names["work"])
        names["run"] = lambda program, *arguments: save_nf4.main([*arguments])
        for name in ("start", "plain", "exercise-1-check", "exercise-2-check", "stop"):
            exec(CELLS[name], names)
        yield names


@pytest.fixture
def pipeline(lesson):
    """The pipeline of the daily use, streamed; whatever a test does to it."""
    return lesson["start"]()[0]


def solution(cell):
    return lessons.solution(CELLS[cell])


def symptom(message):
    """The message, which must be a symptom in the lesson's table, in code."""
    return re.escape(lessons.symptom(CELLS["trouble"], message))


# Exercises


def test_first_exercise(lesson):
    check = lesson["check_gb"]
    assert check(None) == "Give a number of GB."
    assert check(float(re.search(r"= ([\d.]+) GB", solution("exercise-1-solution"))[1])) == "Right."
    assert check(9.0) == "Too few: embeddings and norms stay in bf16."
    assert check(8.75) == "Too few: each 64 weights have a scale of 32 bits."
    assert check(32).startswith("No")


def test_second_exercise(lesson):
    check = lesson["check_second"]
    assert check(None) == "Write a function that takes a pipeline."
    exec(re.search(r"<pre>(.*?)</pre>", solution("end"), re.DOTALL)[1], lesson)
    assert check(lesson["second_pipeline"]) == "Right."
    assert check(FluxImg2ImgPipeline.from_pipe).startswith("The VAE of the first pipeline is torch.float32")
    assert check(lambda pipeline: FluxImg2ImgPipeline.from_pipe(pipeline, dtype=torch.bfloat16)).startswith("Both")
    assert check(lambda pipeline: lesson["start"]()[0]) == "The weights are there twice."


# Five steps


def test_shapes_from_the_hub_are_those_of_the_files(lesson, monkeypatch):
    folder = Path(lesson["source"])
    files = [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]
    monkeypatch.setitem(lesson, "list_repo_files", lambda repo_id: files)
    monkeypatch.setitem(lesson, "parse_safetensors_file_metadata", lambda repo_id, file: parse_local(folder / file))
    for name, found in lesson["shapes"].items():
        assert found and lesson["read_shapes"]("owner/name", name) == found


def parse_local(file):
    """What the Hub's own function gives, from a local file."""
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: TensorInfo(dtype=entry["dtype"], shape=entry["shape"], data_offsets=tuple(entry["data_offsets"]))
        for name, entry in header.items()
    }
    return SafetensorsFileMetadata(metadata=metadata, tensors=tensors)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("StableVideoDiffusionPipeline", "which takes no prompt"),
        ("WanImageToVideoPipeline", "which needs more than a prompt"),
        ("FluxPipelineOfTomorrow", "does not have: use a newer diffusers"),
    ],
)
def test_a_repository_that_the_programs_do_not_take(pipeline, message, tmp_path):
    symptom(message)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert message in message_of(models.find_model, str(tmp_path))


def test_a_pipeline_is_no_safetensors_repository(monkeypatch):
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *arguments, **settings: False)
    with pytest.raises(NotASafetensorsRepoError, match=symptom("is not a safetensors repo")):
        get_safetensors_metadata("owner/name")


def test_what_the_lesson_says_of_klein(lesson):
    """Of both parts, from shapes: 15.8 GB become 5.0."""
    exec(CELLS["klein-code"], lesson)
    transformer, blocks, largest = lesson["rows"]
    outside = transformer["MB in nf4"] - blocks["MB in nf4"]
    assert f"two of the largest: {(outside + 2 * largest['MB in nf4']) / 1e3:.1f} GB for klein" in TEXT
    assert largest["MB in nf4"] == max(
        lesson["expect"]("", {name: weight.shape for name, weight in block.named_parameters()})["MB in nf4"]
        for block in lesson["blocks"]
    )
    with torch.device("meta"):  # as Qwen/Qwen3-4B is published
        sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
        encoder = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    qwen = lesson["expect"]("text_encoder", {name: weight.shape for name, weight in encoder.named_parameters()})
    table = 2 * encoder.get_input_embeddings().weight.numel() / 1e9
    before, after = (sum(part[key] for part in (transformer, qwen)) / 1e3 for key in ("MB in bf16", "MB in nf4"))
    assert f"{before:.1f} GB of weights become {after:.1f} GB" in TEXT
    billions, nf4_gb = qwen["million weights"] / 1e3, qwen["MB in nf4"] / 1e3
    assert f"{billions:.1f} billion weights, comes to {nf4_gb:.1f} GB in the same way; {table:.1f} GB of it" in TEXT


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_what_is_expected_of_flux_is_what_is_written(component, lesson):
    """T5 too, whose `wo` stays as it is."""
    shapes = lesson["read_shapes"](lesson["checkpoint"].path, component)
    written = models.find_model(str(lesson["work"] / "nf4-flux")).sizes[component]
    assert lesson["expect"](component, shapes)["MB in nf4"] == pytest.approx(written / 1e6, rel=0.06)


def test_the_programs_are_those_of_the_lesson():
    commands = re.findall(r"^python programs/(\w+\.py) (.*)", CELLS["compare-read"] + CELLS["draw-read"], re.MULTILINE)
    assert [program for program, _ in commands] == ["save_nf4.py", "draw.py"]
    for program, arguments in commands:
        for word in [program, *arguments.replace('"', "").split()]:
            assert word in CELLS["run"].replace('"', "").replace(",", " ").replace("(", " ").split()


# Every day


def test_what_is_loaded_in_nf4_cannot_be_saved_again(pipeline, tmp_path):
    assert "`NotImplementedError` in `save_pretrained`" in CELLS["trouble"]
    with pytest.raises(NotImplementedError):
        pipeline.save_pretrained(tmp_path / "again")
    pipeline.transformer.save_pretrained(tmp_path / "transformer")  # of diffusers: no such trouble


def test_a_prompt_without_a_text_encoder(pipeline, lesson):
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.tokenizer = pipeline.tokenizer_2 = None
    with pytest.raises(AttributeError, match=symptom("'NoneType' object has no attribute 'tokenize'")):
        lesson["draw"](pipeline)
    assert "or `'dtype'`" in CELLS["trouble"]
    other = tiny_pipelines.build("qwen-image")
    other.text_encoder = other.tokenizer = None
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'dtype'"):
        other("cat", **tiny_pipelines.CALLS["qwen-image"])


def test_a_call_that_is_asked_to_end(pipeline, lesson):
    steps = []

    def count(pipeline, index, timestep, values):
        steps.append(index)
        return lesson["end_half_way"](pipeline, index, timestep, values)

    lesson["draw"](pipeline, callback_on_step_end=count)
    assert len(steps) == lesson["checkpoint"].num_inference_steps // 2
    assert lesson["distance"](lesson["draw"](pipeline)) == 0


@pytest.mark.parametrize("is_freed", [False, True])
def test_a_cache_after_a_stopped_call(pipeline, lesson, is_freed):
    assert "| remains of another prompt |" in CELLS["trouble"]
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))  # skips each step but the first
    draw, other = lesson["draw"], lesson["checkpoint"].prompts[-1]
    expected = draw(pipeline)
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, prompt=other, callback_on_step_end=lesson["press_ctrl_c"])
    if is_freed:
        pipeline.maybe_free_model_hooks()
    assert (lesson["distance"](draw(pipeline), expected) == 0) == is_freed


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card all blocks may stay")
def test_a_block_that_a_cache_skips_is_copied_all_the_same(lesson):
    pipeline, filled = lesson["start"]()
    part = filled.parts["transformer"]
    own, copied, copy = {id(parcel) for parcel in part.parcels}, [], part.ring.copy

    def counting(parcel):
        is_started = copy(parcel)
        copied.extend([parcel.bytes] if is_started and id(parcel) in own else [])
        return is_started

    part.ring.copy = counting
    lesson["draw"](pipeline)  # the order of the copies is learnt
    totals = []
    for is_cached in (False, True):
        if is_cached:
            pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        copied.clear()
        lesson["draw"](pipeline)
        totals.append(sum(copied))
    assert totals[0] > 0 and totals[1] == pytest.approx(totals[0], rel=0.1)


def test_two_techniques(pipeline, lesson):
    assert symptom("is offloaded already")
    with pytest.raises(ValueError, match="is offloaded already"):
        for part in pipeline.components.values():
            if hasattr(part, "_streamed"):
                part._streamed.remove()
        pipeline.enable_model_cpu_offload(device=lesson["device"])
        lesson["stream"](pipeline)


@pytest.mark.parametrize(
    ("message", "test"),
    [
        ("Cannot copy out of meta tensor; no data!", "test_lesson_1.py"),
        ("Input type (c10::BFloat16) and bias type (float) should be the same", "test_lesson_1.py"),
        ("No cache context is set", "test_lesson_3.py"),
        ("is out of bounds", "test_lesson_2.py"),
    ],
)
def test_other_symptoms_are_provoked_elsewhere(message, test):
    assert message in CELLS["trouble"]
    assert message in (Path(__file__).parent / test).read_text(encoding="utf-8")


# What the lesson tries things on


def test_a_tiny_klein_is_the_same_each_time_and_takes_nobodys_random_numbers(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    folders = [Path(tiny_models.save_tiny_klein(tmp_path / name)) for name in "ab"]
    assert torch.equal(torch.rand(2), expected)
    contents = [{file.relative_to(f): file.read_bytes() for file in f.glob("*/*")} for f in folders]
    assert contents[0] == contents[1] and len(contents[0]) >= 9


def test_a_random_lora_leaves_the_pipeline_as_it_was(pipeline, lesson, tmp_path):
    tiny_models.save_random_lora(pipeline, tmp_path, rank=4)
    assert lesson["distance"](lesson["draw"](pipeline)) == 0
    pipeline.load_lora_weights(tmp_path)
    assert lesson["distance"](lesson["draw"](pipeline)) > 0.1

"""What the strategies do to nf4 weights, on pocket-flux. That they draw the right picture is in test_benchmark.py."""

import re
import tomllib
from dataclasses import asdict, replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import tiny_pipelines
import torch
from bitsandbytes.nn import Linear4bit
from conftest import CALL, draw, message_of
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import LayerExecutionTrackerHook
from pipeline_checks import as_fp8

from benchmarks import strategies
from helpers import cpu_backend, devices, measure, models
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError
from helpers.residency import record_residency
from helpers.streaming import find_blocks

PATH = str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")
DEVICE = devices.accelerator()


@pytest.fixture
def transformer():
    cpu_backend.enable()
    return strategies.quantize_at_load(models.find_model(PATH)).transformer


def quantized(module: torch.nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, Linear4bit)}


def test_layers_outside_the_blocks_become_bfloat16(transformer):
    before = quantized(transformer)
    x = torch.randn(2, transformer.x_embedder.in_features, dtype=torch.bfloat16).to(DEVICE)
    embedded = transformer.x_embedder(x)
    strategies.keep_unquantized_outside_blocks(transformer)
    gone = before - quantized(transformer)
    assert {"x_embedder", "context_embedder", "proj_out"} <= gone
    assert not any(name.split(".")[0].endswith("transformer_blocks") for name in gone)
    assert "single_transformer_blocks.0.proj_out" in quantized(transformer)  # of the same name, and stays
    assert transformer.x_embedder.weight.dtype == torch.bfloat16
    torch.testing.assert_close(transformer.x_embedder(x), embedded, rtol=2e-2, atol=2e-2)


def test_quant_states_go_where_they_are_sent_and_weights_stay(transformer):
    strategies.put_quant_states(transformer, torch.device("meta"))
    for layer in transformer.modules():
        if isinstance(layer, Linear4bit):
            assert layer.weight.quant_state.absmax.device.type == "meta"
            assert layer.weight.device.type == DEVICE.type  # quantized there at load


@pytest.mark.parametrize("strategy", ["offload_text_encoders", "offload_leaves", "offload_blocks"])
def test_group_offload_sends_the_quant_states_to_the_accelerator(strategy, monkeypatch):
    cpu_backend.enable()
    model = models.find_model(PATH)
    sent = []
    monkeypatch.setattr(strategies, "put_quant_states", lambda module, device: sent.append(module))
    pipeline = strategies.quantize_at_load(model)
    getattr(strategies, strategy)(pipeline, model)
    assert pipeline.text_encoder_2 in sent
    assert (pipeline.transformer in sent) == (strategy != "offload_text_encoders")


def test_the_rest_stays_and_only_blocks_move():
    cpu_backend.enable()
    model = models.find_model(PATH)
    moved = {}
    for placement in ("block group offload", "block group offload with the rest on the card"):
        pipeline = strategies.quantize_at_load(model)
        strategies.PLACEMENTS[placement](pipeline, model)
        with record_residency(pipeline) as events:
            draw(pipeline, num_inference_steps=1)
        moved[placement] = sum(event.moved_bytes for event in events if event.component == "transformer")
    lists = (pipeline.transformer.transformer_blocks, pipeline.transformer.single_transformer_blocks)
    blocks = sum(sum(devices.footprint(block).values()) for block in lists)
    outside = sum(devices.footprint(pipeline.transformer).values()) - blocks
    everything, without_the_rest = moved.values()
    assert everything - without_the_rest == outside > 0


def load(placement: str = "", start=strategies.quantize_at_load):
    """Pocket-flux in nf4 under a placement, and its model."""
    cpu_backend.enable()
    model = models.find_model(PATH)
    pipeline = start(model)
    pipeline.set_progress_bar_config(disable=True)
    if placement:
        strategies.find_placement(placement, CALL)(pipeline, model)
    return pipeline, model


def without_text_encoders(pipeline, model):
    """The pipeline as it is built for precomputed embeddings."""
    parts = pipeline.components | dict.fromkeys((*model.text_encoders, "tokenizer", "tokenizer_2"))
    bare = type(pipeline)(**parts)
    bare.set_progress_bar_config(disable=True)
    return bare


@pytest.mark.parametrize("placement", strategies.PLACEMENTS)
def test_placements_of_a_pipeline_for_precomputed_embeddings(placement):
    pipeline, model = load("resident")  # a picture of the CPU would be another one
    embeddings, pooled, _ = pipeline.encode_prompt("cat", "cat", max_sequence_length=16)
    bare = without_text_encoders(pipeline, model)
    call = {"prompt": None, "prompt_embeds": embeddings, "pooled_prompt_embeds": pooled, "num_inference_steps": 1}
    if placement.startswith("block"):
        strategies.keep_unquantized_outside_blocks(bare.transformer)  # nf4 and bfloat16 differ by their rounding
    expected = draw(bare, **call)
    strategies.find_placement(placement, CALL | call)(bare, model)
    strategies.check(bare, model, placement, "nf4", placement)
    np.testing.assert_array_equal(draw(bare, **call), expected)


# float8


def has_card(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(devices, "device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_fp8_says_what_is_missing(monkeypatch):
    model = asdict(models.find_model(PATH))
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: None)
    needed = tomllib.loads((PACKAGE_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["fp8"]
    sentence = message_of(strategies.assemble, "fp8, resident, regional compile", model)
    assert f'pip install "{needed[0]}"' in sentence
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cpu"))
    assert "compute capability 8.9 or higher" in message_of(strategies.assemble, "fp8, resident, eager", model)
    has_card(monkeypatch, (8, 6))
    assert "and this is a card: measure nf4" in message_of(strategies.assemble, "fp8, resident, eager", model)
    for capability in ((8, 9), (9, 0), (12, 0)):
        has_card(monkeypatch, capability)
        strategies.check_fp8()


@pytest.mark.parametrize("placement", ["resident", "model offload"])
def test_fp8_of_torchao(placement, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization.quant_api", reason="torchao is an extra")
    if DEVICE.type == "cpu":  # where its products are the same, only slow
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            pytest.skip("an older torch has no products of float8 with a scale for each row on a CPU")
        monkeypatch.setattr(strategies, "check_fp8", lambda: None)
        monkeypatch.setattr(quantization, "_check_hardware_support", lambda granularity: None)
    model = models.find_model(PATH)
    pipelines = [strategies.assemble(f"{start}, {placement}, eager", asdict(model)) for start in ("bf16", "fp8")]
    bf16, fp8 = (devices.component_footprints(pipeline) for pipeline in pipelines)
    assert fp8["vae"] == bf16["vae"] and fp8["text_encoder"] == bf16["text_encoder"]
    for name in model.quantized:
        assert 0.5 < sum(fp8[name].values()) / sum(bf16[name].values()) < 0.6
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    assert 0 < np.abs(draw(pipelines[0]) - draw(pipelines[1])).mean() < 0.02
    assert "cannot be streamed" in message_of(strategies.assemble, "fp8, streamed, 1 GB, eager", asdict(model), CALL)


# A cache


def assemble_cached(family, tmp_path, placement, threshold=None):
    """A pipeline of a family with a cache: a function that measures it in four steps."""
    if not tmp_path.joinpath("model_index.json").exists():
        tiny_pipelines.save(family, tmp_path)
    model = models.find_model(str(tmp_path))
    call = {"prompt": "cat", "num_inference_steps": 4, "output_type": "latent"} | tiny_pipelines.CALLS[family]
    call |= {"guidance_scale": 1.0}
    if placement == "streamed":
        placement = f"streamed, {tiny_pipelines.tight_limit(strategies.load_bf16(model), call):.9f} GB"
    cache = "" if threshold is None else f", first block cache {threshold}"
    pipeline = strategies.assemble(f"bf16, {placement}, eager{cache}", asdict(model), call)
    pipeline.set_progress_bar_config(disable=True)

    def run():
        return pipeline(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

    return lambda: measure.measure_run(run, repeats=1, pipeline=pipeline)


@pytest.mark.parametrize(("family", "share"), [("flux2", 0.75), ("wan22", 0.5)])  # Wan has two transformers
def test_a_cache_skips_what_its_threshold_says(family, share, tmp_path):
    plain = assemble_cached(family, tmp_path, "resident")()
    skipped = assemble_cached(family, tmp_path, "resident", 1000)()
    assert plain.skipped is None and skipped.skipped == share
    assert (skipped.output - plain.output).abs().mean() > 1e-3
    for placement in ("block group offload", "leaf group offload", "streamed"):
        moved = assemble_cached(family, tmp_path, placement, 1000)()
        assert moved.skipped == share and torch.equal(moved.output, skipped.output)
    computed = assemble_cached(family, tmp_path, "streamed", 0)()
    assert computed.skipped == 0 and torch.equal(computed.output, plain.output)


@pytest.mark.parametrize("path", ["flux2", PATH])
def test_a_skipped_step_adds_what_the_last_one_added(path, tmp_path):
    """The same input twice: the second time the other blocks are skipped, and the output is the same."""
    path = path if path == PATH else str(tiny_pipelines.save(path, tmp_path))
    model = models.find_model(path)
    pipeline = strategies.assemble("bf16, resident, eager, first block cache 0", asdict(model))
    pipeline.transformer.float()  # so that nothing is rounded
    forward, outputs = pipeline.transformer.forward, []

    def twice(*args, **kwargs):
        kwargs = {key: value.float() if torch.is_tensor(value) else value for key, value in kwargs.items()}
        outputs.extend(forward(*args, **kwargs)[0] for _ in range(2))
        return (outputs[-1],)

    pipeline.transformer.forward = twice
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    run = measure.measure_run(lambda: draw(pipeline, **call), repeats=1, pipeline=pipeline)
    assert run.skipped == 0.5 and len(outputs) == 8
    for first, second in zip(outputs[::2], outputs[1::2], strict=True):
        torch.testing.assert_close(first, second)


def test_a_cache_lies_around_what_is_compiled_and_offloaded(tmp_path, monkeypatch):
    order = []
    for name in ("offload_blocks", "compile_inside", "cache_first_block", "stream"):
        monkeypatch.setattr(strategies, name, partial(lambda name, *_, **__: order.append(name), name))
    monkeypatch.setattr(strategies, "check", lambda *_: None)
    monkeypatch.setitem(strategies.PLACEMENTS, "block group offload", strategies.offload_blocks)
    monkeypatch.setitem(strategies.COMPILATIONS, "compiled inside", strategies.compile_inside)
    for placement in ("block group offload", "streamed, 1 GB"):
        name = f"bf16, {placement}, compiled inside, first block cache .1"
        strategies.assemble(name, asdict(models.find_model(PATH)), CALL)
    assert order[:3] == ["compile_inside", "cache_first_block", "offload_blocks"]
    assert order[3:] == ["compile_inside", "cache_first_block", "stream"]  # what it keeps is measured


class Skip(ModelHook):
    """A cache that skips its block every time."""

    def new_forward(self, module, value):
        return value


@pytest.mark.parametrize("names", [("cache", "order"), ("order", "cache")])
def test_a_cache_around_group_offload_with_a_stream_is_lost(names):
    """After the first forward diffusers 0.42 removes the hook that notes the order, and with it the one around that.

    So a cache goes within. Where the second case skips too, diffusers has mended it, and either order will do.
    """
    block, hooks, value = (
        torch.nn.Linear(1, 1),
        {"cache": Skip(), "order": LayerExecutionTrackerHook(list)},
        torch.ones(1),
    )
    registry = HookRegistry.check_if_exists_or_initialize(block)
    for name in names:
        registry.register_hook(hooks[name], name)
    assert block(value) is value
    registry.remove_hook("order", recurse=False)
    assert (block(value) is value) == (names[0] == "cache")


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    for family in ("sd3", "sdxl", "ltx2"):
        model = models.find_model(str(tiny_pipelines.save(family, tmp_path / family)))
        sentence = message_of(strategies.assemble, "bf16, resident, eager, first block cache 0.1", asdict(model))
        assert "leave the cache out" in sentence
    name = "bf16, resident, regional compile, first block cache 0.1"
    assert "name compiled inside" in message_of(strategies.assemble, name, asdict(model))
    monkeypatch.setattr(strategies, "cache_first_block", lambda *_, **__: None)
    model = asdict(models.find_model(PATH))
    with pytest.raises(TutorialError, match="the transformer has no cache: mend this strategy"):
        strategies.assemble("bf16, resident, eager, first block cache 0.1", model)


@pytest.mark.parametrize("threshold", ["0", "0.1", ".5", "1000"])
def test_any_threshold_can_be_named(threshold):
    for name in ("bf16, resident, eager", "saved nf4, streamed, 5 GB, compiled inside"):
        assert strategies.is_combination(f"{name}, first block cache {threshold}")
        assert strategies.split_cache(f"{name}, first block cache {threshold}") == (name, float(threshold))


@pytest.mark.parametrize("cache", ["first block cache", "first block cache x", "first block cache -1", "a cache 0.1"])
def test_other_words_name_no_cache(cache):
    assert not strategies.is_combination(f"bf16, resident, eager, {cache}")


# Streaming


@pytest.fixture
def tiny_card(monkeypatch):
    """Tiny models fill no page of a real card: there, a call takes what a CPU counts, and nothing is limited."""

    def limit_to(limit_gb):
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0.6e9 * limit_gb)

    return limit_to if DEVICE.type == "cuda" else lambda limit_gb: None


@pytest.mark.parametrize("compilation", ["eager", "regional compile", "compiled inside"])
@pytest.mark.parametrize(("start", "limit_gb"), [("bf16", 0.01), ("nf4", 0.0055), ("saved nf4", 0.0055)])
def test_streamed_blocks_draw_the_resident_picture(start, limit_gb, compilation, tiny_card, tmp_path, monkeypatch):
    cpu_backend.enable()
    compiled, compiled_before = [], []

    def count(*_, **__):
        compiled_before.append(len(compiled))
        return mock.DEFAULT

    filled = mock.Mock(wraps=strategies.fill_card, side_effect=count)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiled.append(settings) or function)
    monkeypatch.setattr(strategies, "fill_card", filled)
    if start == "saved nf4":
        strategies.save_nf4(asdict(models.find_model(PATH)), str(tmp_path))
    model = asdict(replace(models.find_model(PATH), saved=str(tmp_path)))
    resident = strategies.assemble(f"{start}, resident, eager", model)
    tiny_card(limit_gb)
    streamed = strategies.assemble(f"{start}, streamed, {limit_gb} GB, {compilation}", model, CALL)
    blocks = find_blocks(streamed.transformer)
    moving = [block._parcel.host is not None for block in blocks]
    assert any(moving) and not all(moving)
    assert compiled == ([] if compilation == "eager" else [{"fullgraph": True}] * len(blocks))
    filled.assert_called_once_with(streamed, limit_gb, **CALL)
    assert compiled_before == [len(compiled)]  # so that it measures the compiled blocks
    for pipeline in (resident, streamed):
        pipeline.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(streamed), draw(resident))


def test_a_streamed_pipeline_says_what_is_wrong_with_it(tiny_card):
    cpu_backend.enable()
    model = models.find_model(PATH)
    tiny_card(0.0045)
    name = "nf4, streamed, 0.0045 GB, eager"

    def assembled():
        return strategies.assemble(name, asdict(model), CALL)

    def fault(pipeline):
        with pytest.raises(TutorialError) as caught:
            strategies.check(pipeline, model, name, "nf4", "streamed, 0.0045 GB")
        return str(caught.value)

    pipeline = assembled()
    pipeline.transformer._streamed.remove()
    assert "the transformer is on" in fault(pipeline) and "should be streamed" in fault(pipeline)
    pipeline = assembled()
    del find_blocks(pipeline.text_encoder_2)[0]._streamed
    assert "the text_encoder_2 is streamed in part and should be streamed" in fault(pipeline)
    pipeline = assembled()
    pipeline.transformer._streamed.guests.clear()
    pipeline.transformer._streamed.keep(1e9)
    pipeline.vae._streamed.rest.stay()
    assert re.fullmatch(f"{name}: 0.00[4-9] GB stay on the accelerator: mend this strategy.", fault(pipeline))


def test_a_limit_that_is_too_low_is_one_sentence(tiny_card, monkeypatch):
    cpu_backend.enable()
    model = asdict(models.find_model(PATH))
    tiny_card(1)  # one call takes 0.6 GB
    limit_gb = 0.001
    assert message_of(strategies.assemble, f"nf4, streamed, {limit_gb} GB, eager", model, CALL).endswith(
        "or give more."
    )
    monkeypatch.setattr(strategies, "fill_card", mock.Mock(side_effect=ValueError("Load it anew.")))
    assert message_of(strategies.assemble, "nf4, streamed, 4 GB, eager", model, CALL) == "Load it anew."


def test_streaming_sets_the_limit_on_the_process(monkeypatch):
    limits = []
    monkeypatch.setattr(devices, "limit_memory", limits.append)
    filled = mock.Mock()
    monkeypatch.setattr(strategies, "fill_card", filled)
    for placement in ("streamed, 4 GB", "streamed, 0.5 GB", "streamed, 24 GB"):
        strategies.find_placement(placement, {"height": 32})("pipeline", "model")
    assert limits == [4, 0.5, 24]
    assert filled.mock_calls == [mock.call("pipeline", limit, height=32) for limit in (4, 0.5, 24)]


@pytest.mark.parametrize("name", ["saved nf4, streamed, 5 GB, regional compile", "bf16, streamed, 0.001 GB, eager"])
def test_any_limit_can_be_named(name):
    assert strategies.is_streamed(name)


@pytest.mark.parametrize(
    "name",
    [
        "saved nf4, streamed, 5 GB",
        "nf5, streamed, 5 GB, eager",
        "nf4, streamed, five GB, eager",
        "nf4, streamed, 5 GB, eagre",
        "nf4, resident, eager",
    ],
)
def test_other_names_are_not_streamed(name):
    assert not strategies.is_streamed(name)


# Saving


@pytest.mark.parametrize("family", ["pocket-flux", "sdxl", "ltx2", "wan22"])
def test_what_is_saved_under_block_offload_can_be_loaded(family, tmp_path):
    cpu_backend.enable()
    path = PATH if family == "pocket-flux" else str(tiny_pipelines.save(family, tmp_path / "checkpoint"))
    model = models.find_model(path)
    pipeline = strategies.quantize_at_load(model)
    strategies.offload_blocks(pipeline, model)
    pipeline.save_pretrained(tmp_path / "saved")
    again = strategies.load_saved_nf4(replace(model, saved=str(tmp_path / "saved")))
    original = strategies.quantize_at_load(model)
    for name in model.denoisers:
        expected, loaded = (getattr(part, name).state_dict() for part in (original, again))
        assert expected.keys() == loaded.keys() and any("nf4" in key for key in expected)
        assert all(torch.equal(expected[key].cpu(), loaded[key].cpu()) for key in expected)
    strategies.offload_blocks(again, model)
    pictures = []
    for part in (pipeline, again):
        part.set_progress_bar_config(disable=True)
        call = {"output_type": "latent", "generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
        size = tiny_pipelines.CALLS.get(family, {"height": 32, "width": 32})
        pictures.append(part("cat", **call, **size, return_dict=False)[0])
    assert torch.equal(*pictures)


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_was_changed_is_saved_as_it_is_now(nested, monkeypatch, tmp_path):
    monkeypatch.setitem(strategies.NF4, "bnb_4bit_use_double_quant", nested)
    transformer = load()[0].transformer
    strategies.keep_unquantized_outside_blocks(transformer)
    with torch.no_grad():
        transformer.x_embedder.weight += 0.1  # as fuse_lora does
    transformer.save_pretrained(tmp_path)
    again = type(transformer).from_pretrained(tmp_path, dtype=torch.bfloat16)
    strategies.keep_unquantized_outside_blocks(again)
    changed = again.x_embedder.weight - transformer.x_embedder.weight
    assert 0 < changed.abs().mean() < 0.02
    assert torch.equal(again.context_embedder.weight, transformer.context_embedder.weight)


# LoRA


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA for a layer in the blocks of pocket-flux and for one outside of them."""
    transformer = load(start=strategies.load_bf16)[0].transformer
    torch.manual_seed(0)
    weights = {}
    for name in ("transformer_blocks.0.attn.to_q", "x_embedder"):
        layer = transformer.get_submodule(name)
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) / rank
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) / rank
    return weights


def test_the_rest_stays_after_a_lora_is_loaded():
    placement = "block group offload with the rest on the card"
    pipeline, model = load(placement)
    resident, _ = load("resident")
    strategies.keep_unquantized_outside_blocks(resident.transformer)
    plain = draw(pipeline, num_inference_steps=1)
    onloads = []
    for change in (
        lambda part: None,
        lambda part: part.load_lora_weights(lora()),
        lambda part: part.unload_lora_weights(),
    ):
        change(pipeline)
        change(resident)
        strategies.check(pipeline, model, placement, "nf4", placement)
        with record_residency(pipeline) as events:
            picture = draw(pipeline, num_inference_steps=1)
        onloads += [event.onloads for event in events if event.component == "transformer"]
        np.testing.assert_array_equal(picture, draw(resident, num_inference_steps=1))
        assert np.array_equal(picture, plain) == (len(onloads) != 2)  # the LoRA draws something else
    lists = (pipeline.transformer.transformer_blocks, pipeline.transformer.single_transformer_blocks)
    assert onloads == 3 * [sum(map(len, lists))]


# What a combination says of itself


KINDS = {  # placements of one kind leave the same hooks
    "resident": "resident",
    "model offload": "model",
    "text encoders offloaded": "text",
    "leaf group offload": "leaf",
    "leaf group offload with record_stream": "leaf",
    "block group offload": "block",
    "block group offload without record_stream": "block",
    "block group offload with the rest on the card": "stays",
    "streamed, 4 GB": "streamed",
    "streamed, 8 GB": "streamed",
    "streamed, 12 GB": "streamed",
}


@pytest.mark.parametrize("placement", [None, *strategies.PLACEMENTS])
def test_a_placement_is_told_from_every_other_one(placement):
    pipeline, model = load(placement or "")
    # On a CPU, nothing done is everything resident; a GPU has what was quantized there, and no more.
    nothing = None if cpu_backend.has_gpu() else "resident"
    for other in KINDS:
        if KINDS[other] == KINDS.get(placement, nothing):
            strategies.check(pipeline, model, "this", "nf4", other)
        else:
            with pytest.raises(TutorialError, match=r"^this: the \w+ is .* and should be .*: mend this strategy\.$"):
                strategies.check(pipeline, model, "this", "nf4", other)


@pytest.mark.skipif(not cpu_backend.has_gpu(), reason="on a CPU, nothing done is everything resident")
def test_what_was_not_moved_is_not_resident():
    pipeline, model = load(start=strategies.load_bf16)
    with pytest.raises(TutorialError, match="on cpu and should be on the accelerator"):
        strategies.check(pipeline, model, "this", "bf16", "resident")


def quantize_the_transformer_only(model):
    return strategies.quantize_at_load(replace(model, quantized=("transformer",)))


def make_fp8(model, parts=None):
    """A pipeline in float8, where torchao is not installed."""
    pipeline = strategies.load_bf16(model)
    for name in parts or model.quantized:
        for layer in getattr(pipeline, name).modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight = as_fp8(layer.weight)
    return pipeline


def make_all_fp8(model):
    return make_fp8(model, (*model.denoisers, *model.text_encoders))


@pytest.mark.parametrize(
    ("start", "loader", "fault"),
    [
        ("nf4", strategies.load_bf16, "the text_encoder_2 holds no nf4 weights and should hold some"),
        ("nf4", quantize_the_transformer_only, "the text_encoder_2 holds no nf4 weights and should hold some"),
        ("saved nf4", strategies.load_bf16, "the text_encoder_2 holds no nf4 weights and should hold some"),
        ("bf16", strategies.quantize_at_load, "the text_encoder_2 holds nf4 weights and should hold none"),
        ("fp8", strategies.load_bf16, "the text_encoder_2 holds no float8_e4m3fn weights and should hold some"),
        ("nf4", make_fp8, "the text_encoder_2 holds float8_e4m3fn weights and should hold none"),
        ("fp8", make_all_fp8, "the text_encoder holds float8_e4m3fn weights and should hold none"),
    ],
)
def test_a_start_with_other_weights_than_its_name_says(start, loader, fault, monkeypatch):
    cpu_backend.enable()
    monkeypatch.setitem(strategies.STARTS, start, loader)
    with pytest.raises(TutorialError, match=f"^{start}, model offload, eager: {fault}"):
        strategies.assemble(f"{start}, model offload, eager", asdict(models.find_model(PATH)))


@pytest.mark.parametrize(
    ("recipe", "function", "broken", "fault"),
    [
        ("recipe 1", "quantize_at_load", strategies.load_bf16, "holds no nf4"),
        ("recipe 2", "quantize_at_load", strategies.load_bf16, "holds no nf4"),
        ("recipe 3", "quantize_at_load", strategies.load_bf16, "holds no nf4"),
        ("recipe 2", "offload_models", lambda *_: None, "should be moved as a whole"),
        ("recipe 3", "offload_leaves", lambda *_: None, "should be moved by leaf_level"),
    ],
)
def test_a_recipe_that_leaves_a_step_out(recipe, function, broken, fault, monkeypatch):
    cpu_backend.enable()
    monkeypatch.setattr(strategies, function, broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    with pytest.raises(TutorialError, match=f"^{recipe}: the .*{fault}"):
        strategies.assemble(recipe, asdict(models.find_model(PATH)))


def test_saved_weights_are_loaded_once_and_where_they_were_sent(tmp_path, monkeypatch):
    """WanPipeline calls its transformers optional, which DiffusionPipeline.from_pretrained would load a second time."""
    cpu_backend.enable()
    model = models.find_model(str(tiny_pipelines.save("wan22", tmp_path / "wan")))
    strategies.save_nf4(asdict(model), str(tmp_path / "nf4"))
    load, loaded = WanTransformer3DModel.from_pretrained.__func__, []

    def count(cls, *args, **settings):
        loaded.append(load(cls, *args, **settings))
        return loaded[-1]

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", classmethod(count))
    pipeline = strategies.load_saved_nf4(replace(model, saved=str(tmp_path / "nf4")))
    assert len(loaded) == len(model.denoisers) == 2
    assert pipeline.transformer is loaded[0] and pipeline.transformer_2 is loaded[1]
    assert quantized(pipeline.transformer) and quantized(pipeline.transformer_2)

"""What the strategies do to nf4 weights, on pocket-flux. That they draw the right picture is in test_benchmark.py."""

from dataclasses import asdict, replace

import pytest
import tiny_pipelines
import torch
from bitsandbytes.nn import Linear4bit
from conftest import draw
from diffusers import WanTransformer3DModel

from benchmarks import models, strategies
from helpers import cpu_backend, devices
from helpers.checkpoints import PACKAGE_ROOT
from helpers.residency import record_residency

PATH = str(PACKAGE_ROOT / "checkpoints" / "pocket-flux")


@pytest.fixture
def transformer():
    cpu_backend.enable()
    return strategies.quantize_at_load(models.find_model(PATH)).transformer


def quantized(module: torch.nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, Linear4bit)}


def test_layers_outside_the_blocks_become_bfloat16(transformer):
    before = quantized(transformer)
    x = torch.randn(2, transformer.x_embedder.in_features, dtype=torch.bfloat16)
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
            assert layer.weight.device.type == "cpu"


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

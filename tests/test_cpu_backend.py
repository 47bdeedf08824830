import bitsandbytes.nn.modules
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import draw, nf4_config
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.quantizers import auto as diffusers_auto

from helpers import cpu_backend
from helpers.errors import TutorialError

without_gpu = pytest.mark.skipif(cpu_backend.has_gpu(), reason="the backend is for machines with no GPU")


def nf4_layers(*modules) -> list[Linear4bit]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, Linear4bit)]


@without_gpu
def test_nf4_pipeline_draws_nearly_the_bf16_picture(nf4_pipeline, bf16_pipeline):
    layers = nf4_layers(nf4_pipeline.transformer, nf4_pipeline.text_encoder_2)
    assert len(layers) > 40
    assert all(layer.weight.dtype == torch.uint8 and layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    difference = np.abs(draw(nf4_pipeline) - draw(bf16_pipeline)).mean()
    assert 0 < difference < 0.05


@without_gpu
def test_saved_nf4_weights_load_again(nf4_pipeline, tmp_path):
    expected = draw(nf4_pipeline)
    nf4_pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert len(nf4_layers(loaded.transformer)) == len(nf4_layers(nf4_pipeline.transformer))
    assert len(nf4_layers(loaded.text_encoder_2)) == len(nf4_layers(nf4_pipeline.text_encoder_2))
    np.testing.assert_array_equal(draw(loaded), expected)


@without_gpu
def test_layout_of_nf4_weights_stays_on_every_cpu(monkeypatch, tiny_checkpoint):
    # As on a CPU with AVX512-BF16, whatever this one has.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu
    cpu_backend.enable()
    pipeline = DiffusionPipeline.from_pretrained(
        tiny_checkpoint, dtype=torch.bfloat16, quantization_config=nf4_config()
    )
    for component in (pipeline.transformer, pipeline.text_encoder_2):
        layers = nf4_layers(component)
        assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@without_gpu
def test_dequantize_on_a_cpu(nf4_pipeline):
    nf4_pipeline.transformer.dequantize()
    assert not nf4_layers(nf4_pipeline.transformer)
    assert type(nf4_pipeline.transformer.proj_out) is torch.nn.Linear


@without_gpu
def test_enable_twice_is_the_same():
    before = diffusers_auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    assert before.__name__ == "CPUBnB4BitDiffusersQuantizer"
    cpu_backend.enable()
    assert diffusers_auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is before


def test_enable_does_nothing_with_a_gpu(monkeypatch):
    def repacks():
        return True

    monkeypatch.setattr(cpu_backend, "has_gpu", lambda: True)
    original = diffusers_auto.BnB4BitDiffusersQuantizer
    monkeypatch.setitem(diffusers_auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", original)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", repacks)
    cpu_backend.enable()
    assert diffusers_auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is original
    assert bitsandbytes.nn.modules.has_avx512bf16 is repacks


@without_gpu
def test_diffusers_still_needs_the_backend(monkeypatch, tiny_checkpoint):
    # When this fails, diffusers accepts a CPU by itself, and its half of the backend can go.
    original = diffusers_auto.BnB4BitDiffusersQuantizer
    monkeypatch.setitem(diffusers_auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", original)
    config = nf4_config()._resolve_quant_config(is_diffusers=True, module_name="transformer")
    with pytest.raises(RuntimeError, match="No GPU found"):
        FluxTransformer2DModel.from_pretrained(tiny_checkpoint, subfolder="transformer", quantization_config=config)


@without_gpu
def test_sequential_offload_on_a_cpu(bf16_pipeline):
    expected = draw(bf16_pipeline, num_inference_steps=1)
    bf16_pipeline.enable_sequential_cpu_offload(device="cpu")
    cpu_backend.fix_sequential_offload(bf16_pipeline)
    np.testing.assert_array_equal(draw(bf16_pipeline, num_inference_steps=1), expected)


@pytest.fixture
def search():
    """TorchInductor's search for a compiler; what it found before is forgotten."""
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    yield cpp_builder.cpp_compiler_search
    cpp_builder.cpp_compiler_search.cache_clear()


@without_gpu
def test_no_compiler(search, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("PATH", str(tmp_path))
    for cxx in ((None, "g++"), "g++"):
        with config.patch({"cpp.cxx": cxx}), pytest.raises(TutorialError) as caught:
            cpu_backend.check_compiler()
        assert "g++ was not found" in str(caught.value) and "sudo apt install g++" in str(caught.value)


@without_gpu
def test_compiler_named_by_cxx(search, tmp_path):
    from torch._inductor import config

    compiler = tmp_path / "my-compiler"
    # TorchInductor reads CXX into its configuration when it is imported.
    with config.patch({"cpp.cxx": (None, str(compiler))}):
        for status, mode in ((1, 0o755), (0, 0o644)):
            compiler.write_text(f"#!/bin/sh\nexit {status}\n")
            compiler.chmod(mode)
            with pytest.raises(TutorialError, match="my-compiler was not found"):
                cpu_backend.check_compiler()
        compiler.chmod(0o755)
        cpu_backend.check_compiler()


def test_no_compiler_is_needed_with_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_backend, "has_gpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_backend.check_compiler()

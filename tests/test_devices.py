import gc
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from pipeline_checks import as_fp8

from helpers import devices
from helpers.errors import TutorialError

COMPONENTS = ["text_encoder", "text_encoder_2", "transformer", "vae"]  # in the order in which a call needs them


def test_footprint_of_an_nf4_layer():
    layer = Linear4bit(64, 128, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer = layer.to(torch.bfloat16).to(devices.accelerator())
    # Half a byte per weight; one float32 scale per 64 weights, and the table of 16 float32 levels; 128 biases.
    assert devices.footprint(layer) == {
        "nf4": 64 * 128 // 2,
        "quant_state": 64 * 128 // 64 * 4 + 16 * 4,
        "bfloat16": 256,
    }


def test_footprint_of_double_quantization():
    layer = Linear4bit(64, 128, bias=False, quant_type="nf4", compress_statistics=True).to(devices.accelerator())
    # One byte per scale, one float32 per 256 scales, the two tables (16 and 256 levels), and the offset.
    assert devices.footprint(layer)["quant_state"] == 128 + 4 + 16 * 4 + 256 * 4 + 4


def test_footprint_of_wrapped_weights():
    """As torchao's, which call themselves bfloat16 and have no address."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 16, bias=False))
    for layer in model:
        layer.weight = as_fp8(layer.weight)
    assert model[0].weight.dtype == torch.bfloat16 and model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert devices.footprint(model) == {"float8_e4m3fn": 8 * 8 + 16 * 8, "float32": 4 * (8 + 16)}


def test_footprint_counts_shared_weights_once_and_buffers_too():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert devices.footprint(model) == {"float32": 2 * 8 * 8 * 4}
    model[1].weight = model[0].weight
    assert devices.footprint(model) == {"float32": 8 * 8 * 4}
    model.register_buffer("position", torch.arange(8))
    assert devices.footprint(model) == {"float32": 8 * 8 * 4, "int64": 8 * 8}
    model.register_buffer("view", model[0].weight.data[:4])
    assert devices.footprint(model) == {"float32": 8 * 8 * 4, "int64": 8 * 8}
    # Without memory, as under sequential offloading, tensors have no address to tell them apart.
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False, device="meta") for _ in range(3)))
    model[1].weight = model[0].weight
    assert devices.footprint(model) == {"float32": 2 * 8 * 8 * 4}


def test_nf4_is_a_third_of_bf16(nf4_pipeline, bf16_pipeline):
    nf4, bf16 = devices.component_footprints(nf4_pipeline), devices.component_footprints(bf16_pipeline)
    assert sorted(nf4) == COMPONENTS
    assert nf4["vae"] == bf16["vae"] and set(bf16["transformer"]) == {"bfloat16"}
    assert 0.25 < sum(nf4["transformer"].values()) / sum(bf16["transformer"].values()) < 0.35


def test_free_memory_gives_back_what_is_unreachable():
    def fill():
        cycle = [torch.ones(100_000_000, dtype=torch.uint8, device=devices.accelerator())]
        cycle.append(cycle)

    gc.disable()
    try:
        fill()
        full = devices.memory_gb()
        returned = devices.free_memory()
        # What it says, and what is so: neither a fixed answer nor memory that is still in use passes.
        assert devices.memory_gb() < full - 0.09
        assert returned == pytest.approx(devices.memory_gb(), abs=0.02)
    finally:
        gc.enable()


def test_out_of_memory_is_one_sentence_and_frees_the_block():
    references = []

    def exhaust():
        tensor = torch.ones(10)
        references.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")

    with pytest.raises(TutorialError) as caught, devices.out_of_memory("model CPU offload (lesson 2)"):
        exhaust()
    text = str(caught.value)
    assert "out of memory" in text and "use model CPU offload (lesson 2)" in text and "\n" not in text
    assert references[0]() is None


def test_out_of_memory_leaves_other_errors_and_results():
    with devices.out_of_memory():
        result = 1
    assert result == 1
    with pytest.raises(KeyError), devices.out_of_memory():
        raise KeyError


def test_weights_alive_counts_what_a_forgotten_name_keeps():
    devices.free_memory()
    before = devices.weights_alive_gb()
    layer = torch.nn.Linear(1000, 1000, bias=False)
    kept = torch.nn.Sequential(layer)
    assert devices.weights_alive_gb() == pytest.approx(before + 0.004)  # one weight, though two names lead to it
    del layer
    assert devices.weights_alive_gb() == pytest.approx(before + 0.004)
    del kept
    devices.free_memory()
    assert devices.weights_alive_gb() == pytest.approx(before)


@pytest.mark.parametrize(("needed", "expected"), [(79, True), (81, False)])
def test_a_pipeline_fits_with_a_fifth_of_the_card_left(nf4_pipeline, monkeypatch, needed, expected):
    size = sum(sum(sizes.values()) for sizes in devices.component_footprints(nf4_pipeline).values())
    assert devices.fits(nf4_pipeline) or devices.has_memory_statistics()  # a CPU has no limit
    monkeypatch.setattr(devices, "has_memory_statistics", lambda: True)
    # Free and in all: what else is on the card now does not count.
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1, size * 100 // needed))
    assert devices.fits(nf4_pipeline) is expected


def test_a_limit_is_a_share_of_the_card_less_a_page(monkeypatch):
    shares = []
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (12e9, 16e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    for limit_gb in (8, 80, 0.001):
        devices.limit_memory(limit_gb)
    assert shares == [(8e9 - devices.PAGE) / 16e9, 1.0, 0.0]
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cpu"))
    devices.limit_memory(8)
    assert len(shares) == 3

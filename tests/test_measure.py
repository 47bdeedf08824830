import gc
import os
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import draw
from PIL import Image

from helpers import cpu_backend, measure
from helpers.checkpoints import CHECKPOINTS
from helpers.errors import TutorialError
from helpers.measure import Measurement

COMPONENTS = ["text_encoder", "text_encoder_2", "transformer", "vae"]  # in the order in which a call needs them
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
without_gpu = pytest.mark.skipif(cpu_backend.has_gpu(), reason="for machines with no GPU")


# Memory


def test_footprint_of_an_nf4_layer():
    layer = Linear4bit(64, 128, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer = layer.to(torch.bfloat16).to(measure.accelerator())
    # Half a byte per weight; one float32 scale per 64 weights, and the table of 16 float32 levels; 128 biases.
    assert measure.footprint(layer) == {
        "nf4": 64 * 128 // 2,
        "quant_state": 64 * 128 // 64 * 4 + 16 * 4,
        "bfloat16": 256,
    }


def test_footprint_of_double_quantization():
    layer = Linear4bit(64, 128, bias=False, quant_type="nf4", compress_statistics=True).to(measure.accelerator())
    # One byte per scale, one float32 per 256 scales, the two tables (16 and 256 levels), and the offset.
    assert measure.footprint(layer)["quant_state"] == 128 + 4 + 16 * 4 + 256 * 4 + 4


def test_footprint_counts_shared_weights_once_and_buffers_too():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert measure.footprint(model) == {"float32": 2 * 8 * 8 * 4}
    model[1].weight = model[0].weight
    assert measure.footprint(model) == {"float32": 8 * 8 * 4}
    model.register_buffer("position", torch.arange(8))
    assert measure.footprint(model) == {"float32": 8 * 8 * 4, "int64": 8 * 8}
    model.register_buffer("view", model[0].weight.data[:4])
    assert measure.footprint(model) == {"float32": 8 * 8 * 4, "int64": 8 * 8}
    # Without memory, as under sequential offloading, tensors have no address to tell them apart.
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False, device="meta") for _ in range(3)))
    model[1].weight = model[0].weight
    assert measure.footprint(model) == {"float32": 2 * 8 * 8 * 4}


def test_nf4_is_a_third_of_bf16(nf4_pipeline, bf16_pipeline):
    nf4, bf16 = measure.component_footprints(nf4_pipeline), measure.component_footprints(bf16_pipeline)
    assert sorted(nf4) == COMPONENTS
    assert nf4["vae"] == bf16["vae"] and set(bf16["transformer"]) == {"bfloat16"}
    assert 0.25 < sum(nf4["transformer"].values()) / sum(bf16["transformer"].values()) < 0.35


def test_free_memory_gives_back_what_is_unreachable():
    def fill():
        cycle = [torch.ones(100_000_000, dtype=torch.uint8, device=measure.accelerator())]
        cycle.append(cycle)

    gc.disable()
    try:
        fill()
        full = measure.memory_gb()
        assert measure.free_memory() < full - 0.09
    finally:
        gc.enable()


def test_out_of_memory_is_one_sentence_and_frees_the_block():
    references = []

    def exhaust():
        tensor = torch.ones(10)
        references.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")

    with pytest.raises(TutorialError) as caught, measure.out_of_memory("model CPU offload (lesson 2)"):
        exhaust()
    text = str(caught.value)
    assert "out of memory" in text and "use model CPU offload (lesson 2)" in text and "\n" not in text
    assert references[0]() is None


def test_out_of_memory_leaves_other_errors_and_results():
    with measure.out_of_memory():
        result = 1
    assert result == 1
    with pytest.raises(KeyError), measure.out_of_memory():
        raise KeyError


# Loading and running


def allocate(gigabytes: float):
    np.ones(int(gigabytes * 1e9), dtype=np.uint8)  # and free at once
    return "pipeline"


@pytest.mark.parametrize("kernel_keeps_peak", [True, False])
def test_host_peak_is_that_of_the_block(kernel_keeps_peak, monkeypatch):
    if not kernel_keeps_peak:  # as on macOS and Windows
        monkeypatch.setattr(measure._HostPeak, "_read_kernel_peak", lambda self: {}["VmHWM"])
    # So large that filling it takes longer than the thread sleeps.
    low_before = measure.measure_load(lambda: allocate(0.001))[1].host_peak_gb
    pipeline, load = measure.measure_load(lambda: allocate(0.4))
    low_after = measure.measure_load(lambda: allocate(0.001))[1].host_peak_gb
    assert pipeline == "pipeline"
    assert load.host_peak_gb > low_before + 0.25
    assert low_after < load.host_peak_gb - 0.25


@without_gpu
def test_no_accelerator_no_accelerator_peak():
    assert measure.measure_load(int)[1].load_peak_gb is None
    assert measure.measure_run(int, repeats=1).run_peak_gb is None


def test_load_s():
    assert 0.05 <= measure.measure_load(lambda: time.sleep(0.05))[1].load_s < 0.5


def test_first_call_and_warmups_do_not_count_in_the_latency():
    naps = iter([0.3, 0.2, 0.01, 0.3, 0.02])
    calls = []

    def call():
        calls.append(1)
        time.sleep(next(naps))
        return len(calls)

    run = measure.measure_run(call, repeats=3, warmups=1)
    assert len(calls) == 5 and run.output == 5 and len(run.latencies) == 3
    assert 0.3 <= run.first_call_s < 0.5
    assert 0.02 <= run.latency_s < 0.09  # the median of 10, 300 and 20 ms
    assert run.step_ms is None


def test_measure_run_without_repeats():
    with pytest.raises(ValueError, match="repeats"):
        measure.measure_run(int, repeats=0)


class Scheduler:
    def step(self, sample):
        return sample + 1


@without_gpu  # sleeping is no work for an accelerator
def test_step_ms_is_the_time_between_steps():
    pipeline = SimpleNamespace(scheduler=Scheduler())
    results = []

    def call():
        time.sleep(0.2)  # the text encoders: before the first step ends
        for _ in range(4):
            time.sleep(0.02)
            results.append(pipeline.scheduler.step(1))
        time.sleep(0.2)  # the VAE

    run = measure.measure_run(call, repeats=1, pipeline=pipeline)
    assert 20 <= run.step_ms < 60
    assert results == [2] * 8
    assert "step" not in vars(pipeline.scheduler)


def test_step_ms_of_a_pipeline(bf16_pipeline):
    bf16_pipeline.to(measure.accelerator())
    run = measure.measure_run(lambda: draw(bf16_pipeline), repeats=1, pipeline=bf16_pipeline)
    assert 0 < run.step_ms < 1e3 * run.latency_s
    # With a single step there is nothing between two.
    run = measure.measure_run(lambda: draw(bf16_pipeline, num_inference_steps=1), repeats=1, pipeline=bf16_pipeline)
    assert run.step_ms is None


# The record


def test_measurement_says_what_where_and_on_what(bf16_pipeline):
    load = measure.Load(load_s=1.0, load_peak_gb=12.0, host_peak_gb=30.0)
    run = measure.Run(9.0, 5.0, (5.0, 4.0, 6.0), 150.0, 14.0, 20.0, None)
    checkpoint = CHECKPOINTS["flux", "pocket"]
    record = measure.measurement("nf4", checkpoint, load, run, bf16_pipeline, steps=4)
    assert (record.load_s, record.first_call_s, record.latency_s, record.step_ms) == (1.0, 9.0, 5.0, 150.0)
    assert (record.load_peak_gb, record.run_peak_gb, record.peak_gb, record.host_peak_gb) == (12.0, 14.0, 14.0, 30.0)
    assert (record.checkpoint_size, record.resolution, record.steps, record.seed) == ("pocket", "128x128", 4, 0)
    assert record.repeats == 3 and record.torch == torch.__version__
    total = sum(sum(sizes.values()) for sizes in measure.component_footprints(bf16_pipeline).values())
    assert record.footprint_gb == total / 1e9
    optional = {"driver", "frames", "distance", "failure", "source"}
    assert {name for name, value in record.to_dict().items() if value is None} <= optional


def test_provenance_is_one_line():
    row = Measurement("a", device="card", torch="2.11", height=480, width=832, steps=2, repeats=3, date="2026-01-31")
    assert measure.provenance([row]) == "card, torch 2.11, 832x480, 2 steps, 3 repeats, 2026-01-31"
    clips = [replace(row, frames=81, repeats=1), replace(row, date="2026-02-01"), row]
    when = "2026-01-31 to 2026-02-01"
    assert measure.provenance(clips) == f"card, torch 2.11, 81 frames of 832x480, 2 steps, 1 repeat, {when}"


def test_measurements_survive_a_file(tmp_path):
    checkpoint = CHECKPOINTS["flux", "full"]
    records = [measure.measurement("bf16", checkpoint), Measurement("nf4", latency_s=1.25, run_peak_gb=14.05)]
    measure.save_measurements(records, tmp_path / "results.json")
    assert measure.load_measurements(tmp_path / "results.json") == records


def test_distances_come_by_name(tmp_path):
    rows = [Measurement("bf16", distance=0.0), Measurement("nf4", distance=2.4)]
    measure.save_measurements(rows, tmp_path / "pocket.json")
    big = [Measurement("nf4", latency_s=4.2), Measurement("bf16")]
    assert measure.with_distances(big, tmp_path / "pocket.json") == [replace(big[0], distance=2.4), rows[0]]
    with pytest.raises(KeyError):
        measure.with_distances([Measurement("other")], tmp_path / "pocket.json")


def test_unknown_and_missing_fields():
    with pytest.raises(TutorialError, match="latency"):
        Measurement.from_dict({"name": "nf4", "latency": 1})
    with pytest.raises(TutorialError, match="no field name"):
        Measurement.from_dict({"latency_s": 1})


def test_peak_is_the_larger_one_that_is_known():
    assert Measurement("a", load_peak_gb=12.2, run_peak_gb=7.1).peak_gb == 12.2
    assert Measurement("a", run_peak_gb=7.1).peak_gb == 7.1
    assert Measurement("a").peak_gb is None


# A process of its own


def test_function_of_a_notebook_runs_in_another_process(monkeypatch):
    monkeypatch.setenv("SOME_SETTING", "kept")

    def describe(number):
        import os
        import sys

        return {
            "number": 2 * number,
            "pid": os.getpid(),
            "env": os.environ["SOME_SETTING"],
            "torch": "torch" in sys.modules,
        }

    result = measure.run_in_fresh_process(describe, {"number": 21})
    assert result.pop("pid") != os.getpid()
    assert result == {"number": 42, "env": "kept", "torch": False}


def test_function_of_a_module_runs_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "cases.py").write_text("BASE = 40\ndef add(number): return BASE + number\n")
    monkeypatch.syspath_prepend(tmp_path)
    import cases

    assert measure.run_in_fresh_process("cases:add", {"number": 2}) == 42
    assert measure.run_in_fresh_process(cases.add, {"number": 2}) == 42


def test_measurement_comes_back_as_one(tmp_path, monkeypatch):
    # The name counts, so that the other process need not import ours; the real class takes seconds to import.
    def build():
        class Measurement:
            def to_dict(self):
                return {"name": "nf4", "latency_s": 1.5}

        return Measurement()

    assert measure.run_in_fresh_process(build) == Measurement("nf4", latency_s=1.5)


def failure_of(function, **options) -> str:
    with pytest.raises(TutorialError) as caught:
        measure.run_in_fresh_process(function, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_failure_in_another_process(capfd):
    def fail():
        print("got this far")
        raise ValueError("no such thing")

    assert failure_of(fail) == "fail failed in its own process: ValueError: no such thing; see the output above."
    captured = capfd.readouterr()
    assert "got this far" in captured.out and "Traceback" in captured.err


def test_weights_alive_counts_what_a_forgotten_name_keeps():
    measure.free_memory()
    before = measure.weights_alive_gb()
    layer = torch.nn.Linear(1000, 1000, bias=False)
    kept = torch.nn.Sequential(layer)
    assert measure.weights_alive_gb() == pytest.approx(before + 0.004)  # one weight, though two names lead to it
    del layer
    assert measure.weights_alive_gb() == pytest.approx(before + 0.004)
    del kept
    measure.free_memory()
    assert measure.weights_alive_gb() == pytest.approx(before)


def test_failed_measurement_has_its_own_name_and_no_stack_trace(capfd):
    def fail():
        raise RuntimeError('Error: overwritten by a subsequent run. Stack trace: File "/home/reader/model.py", line 1')

    with pytest.raises(TutorialError) as caught:
        measure.measure_in_fresh_process(fail, CHECKPOINTS["flux", "pocket"], "recipe 1")
    sentence = "recipe 1 failed in its own process: RuntimeError: Error: overwritten by a subsequent run"
    assert str(caught.value) == f"{sentence}; see the output above."
    assert "/home/reader/model.py" in capfd.readouterr().err


def test_success_in_another_process_shows_nothing(capfd):
    def noisy():
        import sys

        print("out")
        print("err", file=sys.stderr)
        return 1

    assert measure.run_in_fresh_process(noisy) == 1
    assert capfd.readouterr() == ("", "")


def test_sentence_of_another_process_is_kept():
    def fail():
        class TutorialError(RuntimeError):
            pass

        TutorialError.__module__, TutorialError.__qualname__ = "helpers.errors", "TutorialError"
        raise TutorialError("Install it.")

    assert failure_of(fail) == "Install it."


def test_out_of_memory_in_another_process():
    def fail():
        class OutOfMemoryError(RuntimeError):
            pass

        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    assert "fail ran out of accelerator memory" in failure_of(fail)


def test_killed_process():
    def die():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    assert "SIGKILL" in failure_of(die) and "host memory" in failure_of(die)


def test_process_that_takes_too_long():
    def sleep():
        import time

        time.sleep(60)

    assert "sleep did not finish in 1 s" in failure_of(sleep, timeout_s=1)


def test_function_with_variables_of_another():
    number = 1

    def add():
        return number + 1

    assert "add uses variables of the function around it (number)" in failure_of(add)


def load_bf16(path: str, steps: int):
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16)
    return pipeline, {"num_inference_steps": steps, "max_sequence_length": None}


def test_a_pipeline_in_a_fresh_process(tiny_checkpoint, tmp_path):
    settings = replace(CHECKPOINTS["flux", "pocket"], height=32, width=32)
    picture = tmp_path / "picture.png"
    result = measure.measure_in_fresh_process(
        load_bf16, settings, "bf16", {"path": str(tiny_checkpoint), "steps": 2}, repeats=2, picture=picture
    )
    assert (result.name, result.repeats, result.height) == ("bf16", 2, 32)
    assert result.load_s > 0 and result.latency_s > 0 and result.host_peak_gb > 0.2 and result.footprint_gb > 0
    pipeline, changes = load_bf16(str(tiny_checkpoint), 2)
    pipeline.set_progress_bar_config(disable=True)
    call = settings.call_arguments | {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    del call["max_sequence_length"]  # None removes it: the pipeline's own 512 tokens count
    np.testing.assert_array_equal(np.asarray(pipeline(**call).images[0]), np.asarray(Image.open(picture)))


def test_a_pipeline_that_fails_in_a_fresh_process(tmp_path):
    with pytest.raises(TutorialError, match="failed in its own process"):
        measure.measure_in_fresh_process(
            load_bf16, CHECKPOINTS["flux", "pocket"], "x", {"path": str(tmp_path), "steps": 1}
        )


# On a GPU


@with_cuda
def test_peaks_on_cuda():
    def build():
        torch.ones(500_000_000, dtype=torch.uint8, device="cuda")
        return {"weight": torch.ones(100_000_000, dtype=torch.uint8, device="cuda")}

    before = measure.free_memory()
    model, load = measure.measure_load(build)
    assert 0.49 < load.load_peak_gb - before < 0.52
    run = measure.measure_run(lambda: model["weight"].float(), repeats=2)  # 0.4 GB more, and never twice
    assert 0.49 < run.run_peak_gb - before < 0.52
    model.clear()
    del run
    assert measure.free_memory() < before + 0.01


@with_cuda
def test_pinned_copies_are_host_memory():
    low = measure.measure_load(int)[1].host_peak_gb
    _, load = measure.measure_load(lambda: torch.ones(400_000_000, dtype=torch.uint8).pin_memory())
    assert load.host_peak_gb > low + 0.75  # the pageable one and the pinned one


@with_cuda
def test_times_wait_for_cuda():
    matrix = torch.randn(8192, 8192, device="cuda")

    def work():
        for _ in range(20):
            matrix @ matrix

    run = measure.measure_run(work, repeats=2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    assert run.latency_s > 0.5 * (time.perf_counter() - start)

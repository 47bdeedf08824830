import time

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import draw
from diffusers.hooks import FirstBlockCacheConfig
from tqdm import tqdm

from helpers import cpu_backend, devices, measure

with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
without_gpu = pytest.mark.skipif(cpu_backend.has_gpu(), reason="for machines with no GPU")


def allocate(gigabytes: float):
    np.ones(int(gigabytes * 1e9), dtype=np.uint8)  # and free at once
    return "pipeline"


@pytest.mark.parametrize("kernel_keeps_peak", [True, False])
def test_host_peak_is_that_of_the_block(kernel_keeps_peak, monkeypatch):
    if not kernel_keeps_peak:  # as on macOS and Windows
        monkeypatch.setattr(measure, "_kernel_peak_gb", lambda: {}["VmHWM"])
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


class Counters:
    """PyTorch's counters of a card, of which a reset lets the peaks fall to what is in use now."""

    def __init__(self, monkeypatch) -> None:
        self.allocated, self.reserved = 0, 0
        for module in (measure, devices):
            monkeypatch.setattr(module, "has_memory_statistics", lambda: True)
        monkeypatch.setattr(devices, "_reserved", 0)
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda: self.reserved)
        monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def use(self, allocated: float, reserved: float) -> None:
        self.allocated, self.reserved = max(self.allocated, allocated), max(self.reserved, reserved)

    def reset(self, device=None) -> None:
        self.allocated = self.reserved = 1e9


def test_a_reset_of_the_counters_loses_no_peak(monkeypatch):
    counters = Counters(monkeypatch)

    def load():
        counters.use(6e9, 7e9)
        torch.cuda.reset_peak_memory_stats(torch.device("cuda:0"))  # as fill_card does
        counters.use(2e9, 3e9)

    assert measure.measure_load(load)[1].load_peak_gb == 6 and devices.reserved_gb() == 7
    assert measure.measure_run(lambda: counters.use(4e9, 5e9), repeats=1).run_peak_gb == 4
    assert devices.reserved_gb() == 7  # loading included
    assert measure.measure_run(lambda: counters.use(4e9, 8e9), repeats=1).run_peak_gb == 4
    assert devices.reserved_gb() == 8
    counters.use(0, 9e9)  # between two measurements
    assert measure.measure_load(int)[1].load_peak_gb == 1 and devices.reserved_gb() == 9


@without_gpu
def test_no_accelerator_reserves_nothing():
    assert devices.reserved_gb() is None


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
    assert len(calls) == 5 and run.output == 5 and len(run.latencies_s) == 3
    assert 0.3 <= run.first_call_s < 0.5
    assert 0.02 <= run.latency_s < 0.09  # the median of 10, 300 and 20 ms
    assert run.step_ms is None


def test_measure_run_without_repeats():
    with pytest.raises(ValueError, match="repeats"):
        measure.measure_run(int, repeats=0)


class Pipeline:
    """A denoising loop of four steps, with the progress bar of diffusers in one of its two forms."""

    def __init__(self, form: str) -> None:
        self.form = form

    def progress_bar(self, iterable=None, total=None):
        return tqdm(iterable, total=total, disable=True)

    def __call__(self) -> list[int]:
        done = []
        time.sleep(0.2)  # the text encoders: before the first step ends
        if self.form == "iterable":
            for step in self.progress_bar([0, 1, 2, 3]):
                time.sleep(0.02)
                done.append(step)
        else:
            with self.progress_bar(total=4) as bar:
                for step in range(4):
                    time.sleep(0.02)
                    done.append(step)
                    bar.update()
        time.sleep(0.2)  # the VAE
        return done


@without_gpu  # sleeping is no work for an accelerator
@pytest.mark.parametrize("form", ["iterable", "total"])
def test_step_ms_is_the_time_between_steps(form):
    pipeline = Pipeline(form)
    run = measure.measure_run(pipeline, repeats=1, pipeline=pipeline)
    assert 20 <= run.step_ms < 60
    assert run.output == [0, 1, 2, 3]
    assert "progress_bar" not in vars(pipeline)


def test_step_ms_of_a_pipeline(bf16_pipeline):
    bf16_pipeline.to(devices.accelerator())
    run = measure.measure_run(lambda: draw(bf16_pipeline), repeats=1, pipeline=bf16_pipeline)
    assert 0 < run.step_ms < 1e3 * run.latency_s
    # With a single step there is nothing between two.
    run = measure.measure_run(lambda: draw(bf16_pipeline, num_inference_steps=1), repeats=1, pipeline=bf16_pipeline)
    assert run.step_ms is None


def test_skipped_is_the_share_of_the_repeats(bf16_pipeline):
    run = measure.measure_run(lambda: draw(bf16_pipeline), repeats=1, pipeline=bf16_pipeline)
    assert run.skipped is None  # without a cache
    bf16_pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1000))
    expected = draw(bf16_pipeline)
    steps = iter([3, 3, 3, 1])  # with a single step nothing is skipped

    def call():
        return draw(bf16_pipeline, num_inference_steps=next(steps))

    run = measure.measure_run(call, repeats=2, warmups=1, pipeline=bf16_pipeline)
    assert run.skipped == 2 / 4
    assert measure.measure_run(lambda: draw(bf16_pipeline), repeats=2, pipeline=bf16_pipeline).skipped == 2 / 3
    np.testing.assert_array_equal(draw(bf16_pipeline), expected)
    hook = bf16_pipeline.transformer.transformer_blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
    assert "_should_compute_remaining_blocks" not in vars(hook)


STEPS = 3
WORKING = {"sd3": 20, "sdxl": 20, "pixart": 20, "wan22": 20}  # so many at the least; 4 of the other families


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of schedulers in combinations that nobody uses
@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_measuring_changes_no_picture(family):
    """With every scheduler that the pipeline can be called with when nobody measures; the others are left out."""
    pipeline = tiny_pipelines.build(family).to(devices.accelerator())
    pipeline.set_progress_bar_config(disable=True)
    tiny_pipelines.encode_once(pipeline)
    pictures = []

    def call() -> None:
        torch.manual_seed(0)  # some schedulers draw their noise from the generator of the process
        output = pipeline(
            prompt="a lighthouse",
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
            **tiny_pipelines.CALLS[family],
        )
        pictures.append([torch.as_tensor(part) for part in output if part is not None])  # LTX-2: video and sound

    working = []
    for name, scheduler in tiny_pipelines.schedulers(pipeline).items():
        pipeline.scheduler = scheduler
        pictures.clear()
        try:
            call()
        except Exception:
            continue
        run = measure.measure_run(call, repeats=1, pipeline=pipeline)
        expected, *measured = pictures
        for latents in measured:
            assert all(torch.equal(*pair) for pair in zip(latents, expected, strict=True)), name
        assert all(part.isfinite().all() for part in expected), name
        assert run.step_ms is not None and 0 < run.step_ms < 1e3 * run.latency_s, name
        working.append(name)
    assert type(tiny_pipelines.build(family).scheduler).__name__ in " ".join(working)
    assert len(working) >= WORKING.get(family, 4), working


@with_cuda
def test_peaks_on_cuda():
    def build():
        torch.ones(500_000_000, dtype=torch.uint8, device="cuda")
        return {"weight": torch.ones(100_000_000, dtype=torch.uint8, device="cuda")}

    before = devices.free_memory()
    model, load = measure.measure_load(build)
    assert 0.49 < load.load_peak_gb - before < 0.52
    run = measure.measure_run(lambda: model["weight"].float(), repeats=2)  # 0.4 GB more, and never twice
    assert 0.49 < run.run_peak_gb - before < 0.52
    model.clear()
    del run
    assert devices.free_memory() < before + 0.01


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

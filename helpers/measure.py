"""Latency and memory of loading a pipeline and of running it.

The words are fields of `helpers.records.Measurement`; GB is 1e9 bytes. Accelerator figures are those of PyTorch's
allocator, and None on a machine with no accelerator. The host figure is the resident set of the whole process.
"""

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from helpers.devices import GB, accelerator, component_modules, has_memory_statistics, reserved_gb, synchronize


def _watch_host() -> Callable[[], float]:
    """Watch the resident memory of this process. What it returns is to be called at the end: it gives the peak in GB.

    On Linux the kernel keeps that figure (VmHWM) and lets a process reset it, so no short peak is missed
    (https://docs.kernel.org/filesystems/proc.html, clear_refs). Elsewhere a thread looks every 5 ms.
    """
    with contextlib.suppress(OSError, LookupError):
        Path("/proc/self/clear_refs").write_text("5")
        _kernel_peak_gb()
        return _kernel_peak_gb
    memory_info, finished = psutil.Process().memory_info, threading.Event()
    highest = memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not finished.wait(0.005):
            highest = max(highest, memory_info().rss)

    def stop() -> float:
        finished.set()
        thread.join()
        return highest / GB

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return stop


def _kernel_peak_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GB


@contextlib.contextmanager
def _peaks() -> Iterator[dict[str, float | None]]:
    """Peaks of the block in GB, once it is left: of the "accelerator" (None without one), and of the "host".

    `fill_card` resets PyTorch's counters while it plans: what they had counted by then is read before.
    """
    peaks, reset = {"accelerator": None}, torch.cuda.reset_peak_memory_stats

    def read() -> None:
        if has_memory_statistics():
            peaks["accelerator"] = max(peaks["accelerator"] or 0.0, torch.accelerator.max_memory_allocated() / GB)
            reserved_gb()

    synchronize()
    if has_memory_statistics():
        reserved_gb()
        torch.accelerator.reset_peak_memory_stats()
    stop = _watch_host()
    try:
        with mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda device=None: (read(), reset(device))):
            yield peaks
    finally:
        synchronize()
        peaks["host"] = stop()
        read()


@dataclass(frozen=True)
class Load:
    """What loading took. Fields as in `Measurement`."""

    load_s: float
    load_peak_gb: float | None
    host_peak_gb: float


@dataclass(frozen=True)
class Run:
    """What running took, and what the last call returned. Other fields as in `Measurement`."""

    first_call_s: float
    latency_s: float
    latencies_s: list[float]
    step_ms: float | None
    run_peak_gb: float | None
    host_peak_gb: float
    output: Any = field(repr=False)
    warmups: int = 0
    skipped: float | None = None


def measure_load(function: Callable[[], Any]) -> tuple[Any, Load]:
    """Call `function`, which loads a pipeline and brings it where it runs. Returns the pipeline and what it took."""
    with _peaks() as peaks:
        start = time.perf_counter()
        pipeline = function()
        synchronize()
        load_s = time.perf_counter() - start
    return pipeline, Load(load_s, peaks["accelerator"], peaks["host"])


def measure_run(function: Callable[[], Any], repeats: int = 3, warmups: int = 0, pipeline: Any | None = None) -> Run:
    """Call `function` 1 + `warmups` + `repeats` times. `function` runs the pipeline once, the same each time.

    The first call, compilation included, gives `first_call_s`; the `warmups` after it count for nothing; `latency_s`
    is the median of the `repeats`. The peaks are over all of them. With `pipeline`, the same calls also give `step_ms`,
    the median time from the end of one denoising step to the end of the next in the repeats; None with fewer than two
    steps. Where a FirstBlockCache is on, `skipped` is the share of the repeats' calls of a denoiser that it cut short:
    unless all later steps are of one kind, `step_ms` is that of the more frequent. Raises ValueError if `repeats` is
    below 1.
    """
    if repeats < 1:
        raise ValueError("repeats must be at least 1")
    seconds: list[float] = []
    steps: list[float] = []
    with _peaks() as peaks, _record_skips(pipeline) as skips:
        for index in range(1 + warmups + repeats):
            output = None  # the last one must not count in the peak of this one
            with _record_steps(pipeline) as interval_ms:
                start = time.perf_counter()
                output = function()
                synchronize()
                seconds.append(time.perf_counter() - start)
            if index > warmups:
                steps += interval_ms
            else:
                skips.clear()
    return Run(
        first_call_s=seconds[0],
        latency_s=statistics.median(seconds[1 + warmups :]),
        latencies_s=seconds[1 + warmups :],
        step_ms=statistics.median(steps) if steps else None,
        run_peak_gb=peaks["accelerator"],
        host_peak_gb=peaks["host"],
        output=output,
        warmups=warmups,
        skipped=sum(skips) / len(skips) if skips else None,
    )


@contextlib.contextmanager
def _record_skips(pipeline: Any | None) -> Iterator[list[bool]]:
    """For each call of a denoiser with a FirstBlockCache of diffusers: whether it skipped the other blocks."""
    skips: list[bool] = []
    parts = component_modules(pipeline).values() if hasattr(pipeline, "components") else ()
    registries = [getattr(module, "_diffusers_hook", None) for part in parts for module in part.modules()]
    hooks = [registry.get_hook("fbc_leader_block_hook") for registry in registries if registry is not None]
    with contextlib.ExitStack() as stack:
        for hook in filter(None, hooks):
            decide = hook._should_compute_remaining_blocks

            @torch.compiler.disable  # as what it stands for
            def decide_and_record(residual: torch.Tensor, decide: Callable[..., bool] = decide) -> bool:
                computes = decide(residual)
                skips.append(not computes)
                return computes

            stack.enter_context(mock.patch.object(hook, "_should_compute_remaining_blocks", decide_and_record))
        yield skips


@contextlib.contextmanager
def _record_steps(pipeline: Any | None) -> Iterator[list[float]]:
    """Milliseconds between the ends of successive denoising steps; the list is filled when the block is left.

    A step ends where the pipeline moves its progress bar on, as every denoising loop of diffusers does. The bar takes
    no part in the arithmetic, so that watching it changes no picture; a scheduler may be copied, or be asked for its
    signature. On an accelerator an event in the stream takes the time, so that nothing waits for it.
    """
    intervals: list[float] = []
    if not hasattr(pipeline, "progress_bar"):
        yield intervals
        return
    device = accelerator()
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cpu":
            marks.append(time.perf_counter())
        else:
            event = torch.Event(device, enable_timing=True)
            event.record()
            marks.append(event)

    def rounds(bar: Iterable) -> Iterator:
        for entry in bar:
            yield entry
            mark()

    def progress_bar(iterable: Iterable | None = None, *args: Any, **kwargs: Any) -> Any:
        bar = type(pipeline).progress_bar(pipeline, iterable, *args, **kwargs)
        if iterable is not None:  # the loop is over the bar, which moves itself on
            return rounds(bar)
        update = bar.update

        def update_and_mark(*args: Any, **kwargs: Any) -> Any:
            mark()
            return update(*args, **kwargs)

        bar.update = update_and_mark
        return bar

    with mock.patch.object(pipeline, "progress_bar", progress_bar):
        yield intervals
    synchronize()
    for earlier, later in itertools.pairwise(marks):
        intervals.append((later - earlier) * 1e3 if device.type == "cpu" else earlier.elapsed_time(later))

"""Latency and memory of one run.

The words are fields of `Measurement`; GB is 1e9 bytes. Accelerator figures are what the allocator of PyTorch has handed
out (`torch.accelerator.max_memory_allocated`), and None on a machine with no accelerator. The host figure is the
resident set of the whole process.
"""

import contextlib
import ctypes
import datetime
import gc
import inspect
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from helpers import cpu_backend, fresh_process
from helpers.checkpoints import Checkpoint
from helpers.errors import TutorialError

GB = 1e9


# Devices and memory


def accelerator() -> torch.device:
    """The device that the lessons run on: the accelerator of this machine, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize() -> None:
    """Wait until the accelerator has done all its work. Its work is asynchronous: time nothing without this."""
    if accelerator().type != "cpu":
        torch.accelerator.synchronize()


def _has_memory_statistics() -> bool:
    return accelerator().type not in ("cpu", "mps")


def memory_gb() -> float:
    """Memory in use now, in GB: allocated accelerator memory, or on a CPU the resident memory of this process."""
    if _has_memory_statistics():
        return torch.accelerator.memory_allocated() / GB
    return psutil.Process().memory_info().rss / GB


def free_memory() -> float:
    """Give back memory that nothing refers to any more. Returns `memory_gb()`, for the check that it is free.

    Delete your own variables first (`del pipeline`), in a notebook also `_` if a cell displayed one of them.
    """
    gc.collect()  # pipelines and hooks refer to each other, so that reference counting alone frees nothing
    if _has_memory_statistics():
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
    return memory_gb()


def weights_alive_gb() -> float:
    """GB of the parameters that something still refers to, on any device: after `free_memory` it should be 0.

    It counts on a CPU too, where `memory_gb` cannot tell weights from the rest of the process.
    """
    # By their type: asking an object itself, as isinstance does, would wake what is imported lazily.
    weights = [entry for entry in gc.get_objects() if issubclass(type(entry), torch.nn.Parameter)]
    return sum(weight.nbytes for weight in weights if weight.device.type != "meta") / GB


def footprint(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of the weights of `module` by kind, largest first: a dtype such as "bfloat16", "nf4", or "quant_state".

    "nf4" (or "fp4") are the packed 4-bit weights of bitsandbytes. "quant_state" is what it needs besides to read them:
    one scale (absmax) per block of 64 weights and a few small tables. Tensors that share memory count once.
    """
    seen = set()
    sizes: dict[str, int] = {}

    def add(kind: str, tensor: torch.Tensor) -> None:
        # All meta tensors have address 0: there only the object tells them apart.
        key = (tensor.device, tensor.data_ptr()) if tensor.device.type != "meta" else id(tensor)
        if tensor.numel() and key not in seen:
            seen.add(key)
            sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()

    for tensor in (*module.parameters(), *module.buffers()):
        state = getattr(tensor, "quant_state", None)
        if state is None:
            add(str(tensor.dtype).removeprefix("torch."), tensor)
            continue
        add(state.quant_type, tensor)
        # With double quantization absmax is itself quantized: state2 holds the scales of the scales.
        for part in (state, state.state2) if state.nested else (state,):
            add("quant_state", part.absmax)
            add("quant_state", part.code)
        if state.nested:
            add("quant_state", state.offset)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def component_footprints(pipeline: Any) -> dict[str, dict[str, int]]:
    """`footprint` of each component of a diffusers pipeline that has weights, in the order of `pipeline.components`."""
    return {name: footprint(module) for name, module in component_modules(pipeline).items()}


def fits(pipeline: Any) -> bool:
    """Whether all components of a pipeline fit on the accelerator at once, with a fifth of it left for activations."""
    if not _has_memory_statistics():
        return True
    needed = sum(sum(sizes.values()) for sizes in component_footprints(pipeline).values())
    return needed < 0.8 * torch.accelerator.get_memory_info()[1]


def component_modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components of a diffusers pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@contextlib.contextmanager
def out_of_memory(
    technique: str = "an offloading technique of the next lessons, or a smaller height and width",
) -> Iterator[None]:
    """Turn `torch.OutOfMemoryError` inside the block into one sentence, and free what the block had allocated.

    `technique` says what needs less memory: it completes "use ...".

    Raises:
        TutorialError: the accelerator ran out of memory.
    """
    message = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The traceback holds on to the local variables of every frame, and with them to the tensors.
        traceback.clear_frames(error.__traceback__)
        message = f"The accelerator is out of memory ({_card()}): use {technique}, then restart the kernel."
    if message is not None:
        free_memory()
        raise TutorialError(message) from None


def _card() -> str:
    """Name and memory of the accelerator, for a sentence."""
    if not _has_memory_statistics():
        return device_name()
    free, total = torch.get_device_module(accelerator()).mem_get_info()
    return f"{device_name()}, {free / GB:.1f} of {total / GB:.1f} GB free"


class _HostPeak:
    """Highest resident memory of this process between `start` and `stop`.

    On Linux the kernel keeps that figure (VmHWM) and lets a process reset it, so no short peak is missed
    (https://docs.kernel.org/filesystems/proc.html, clear_refs). Elsewhere a thread looks every 5 ms.
    """

    def start(self) -> None:
        self._process = psutil.Process()
        self._thread = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._read_kernel_peak()
        except (OSError, LookupError):
            self._highest = self._process.memory_info().rss
            self._finished = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> float:
        """The peak in GB."""
        if self._thread is None:
            return self._read_kernel_peak() / GB
        self._finished.set()
        self._thread.join()
        return self._highest / GB

    def _watch(self) -> None:
        while not self._finished.wait(0.005):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def _read_kernel_peak(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(status["VmHWM"].removesuffix("kB")) * 1024


@dataclass
class _Peaks:
    accelerator_gb: float | None = None
    host_gb: float = 0.0


@contextlib.contextmanager
def _peaks() -> Iterator[_Peaks]:
    """Peaks of the block; the fields hold once it is left."""
    peaks = _Peaks()
    host = _HostPeak()
    synchronize()
    if _has_memory_statistics():
        torch.accelerator.reset_peak_memory_stats()
    host.start()
    try:
        yield peaks
    finally:
        synchronize()
        peaks.host_gb = host.stop()
        if _has_memory_statistics():
            peaks.accelerator_gb = torch.accelerator.max_memory_allocated() / GB


# Time


@dataclass(frozen=True)
class Load:
    """What loading took. Fields as in `Measurement`."""

    load_s: float
    load_peak_gb: float | None
    host_peak_gb: float


@dataclass(frozen=True)
class Run:
    """What running took. Fields as in `Measurement`, besides all latencies, and what the last call returned."""

    first_call_s: float
    latency_s: float
    latencies: tuple[float, ...]
    step_ms: float | None
    run_peak_gb: float | None
    host_peak_gb: float
    output: Any = field(repr=False)
    warmups: int = 0


def measure_load(function: Callable[[], Any]) -> tuple[Any, Load]:
    """Call `function`, which loads a pipeline and brings it where it runs. Returns the pipeline and what it took."""
    with _peaks() as peaks:
        start = time.perf_counter()
        pipeline = function()
        synchronize()
        load_s = time.perf_counter() - start
    return pipeline, Load(load_s, peaks.accelerator_gb, peaks.host_gb)


def measure_run(function: Callable[[], Any], repeats: int = 3, warmups: int = 0, pipeline: Any | None = None) -> Run:
    """Call `function` 1 + `warmups` + `repeats` times. `function` runs the pipeline once, the same each time.

    The first call, compilation included, gives `first_call_s`; the `warmups` after it count for nothing; `latency_s`
    is the median of the `repeats`. The peaks are over all of them. With `pipeline`, the same calls also give `step_ms`,
    the median time from the end of one denoising step to the end of the next in the repeats; None with fewer than two
    steps, or with no scheduler.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError("repeats must be at least 1")
    seconds = []
    steps: list[float] = []
    with _peaks() as peaks:
        for index in range(1 + warmups + repeats):
            output = None  # the last one must not count in the peak of this one
            with _record_steps(pipeline) as interval_ms:
                start = time.perf_counter()
                output = function()
                synchronize()
                seconds.append(time.perf_counter() - start)
            if index > warmups:
                steps += interval_ms
    latencies = tuple(seconds[1 + warmups :])
    return Run(
        first_call_s=seconds[0],
        latency_s=statistics.median(latencies),
        latencies=latencies,
        step_ms=statistics.median(steps) if steps else None,
        run_peak_gb=peaks.accelerator_gb,
        host_peak_gb=peaks.host_gb,
        output=output,
        warmups=warmups,
    )


@contextlib.contextmanager
def _record_steps(pipeline: Any | None) -> Iterator[list[float]]:
    """Milliseconds between the ends of successive denoising steps; the list is filled when the block is left.

    A step ends when the scheduler has been called. The scheduler is never compiled, so that timing there disturbs no
    graph; and on an accelerator an event in the stream takes the time, so that nothing waits for it.
    """
    intervals: list[float] = []
    if pipeline is None:
        yield intervals
        return
    scheduler = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step"):
        yield intervals
        return
    device = accelerator()
    marks = []

    def step(*args, **kwargs):
        result = type(scheduler).step(scheduler, *args, **kwargs)
        if device.type == "cpu":
            marks.append(time.perf_counter())
        else:
            event = torch.Event(device, enable_timing=True)
            event.record()
            marks.append(event)
        return result

    scheduler.step = step
    try:
        yield intervals
    finally:
        del scheduler.step
        synchronize()
        for earlier, later in zip(marks, marks[1:], strict=False):
            intervals.append((later - earlier) * 1e3 if device.type == "cpu" else earlier.elapsed_time(later))


# The record of a measurement


@dataclass(frozen=True)
class Measurement:
    """One configuration, measured. What a table shows is a field here.

    Attributes:
        name: what was combined, such as "nf4 + compile".
        load_s: from_pretrained until ready.
        first_call_s: the first call, compilation included.
        latency_s: median of the later calls.
        step_ms: median denoising step.
        load_peak_gb, run_peak_gb: highest allocated accelerator memory while loading, while running; None on a CPU.
        host_peak_gb: highest resident host memory, loading and running.
        footprint_gb: bytes of all weights, wherever they are.
        device to date: where, with what and on what this was measured.
        warmups, latencies_s: calls after the first that count for nothing; seconds of each of the `repeats` after them.
        call: what the pipeline was called with: the prompt, and the settings that were not left to it.
        distance: `helpers.quality` distance of its picture to the one that it is compared with, in levels of 0 to 255.
        failure: why there are no figures, in one sentence; None if it ran.
        source: where a figure that was not measured here is published.
    """

    name: str
    load_s: float | None = None
    first_call_s: float | None = None
    latency_s: float | None = None
    step_ms: float | None = None
    load_peak_gb: float | None = None
    run_peak_gb: float | None = None
    host_peak_gb: float | None = None
    footprint_gb: float | None = None
    device: str | None = None
    driver: str | None = None
    torch: str | None = None
    diffusers: str | None = None
    transformers: str | None = None
    bitsandbytes: str | None = None
    model: str | None = None
    checkpoint_size: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    frames: int | None = None
    seed: int | None = None
    repeats: int | None = None
    date: str | None = None
    warmups: int | None = None
    latencies_s: tuple[float, ...] | None = None
    call: dict[str, Any] | None = None
    distance: float | None = None
    failure: str | None = None
    source: str | None = None

    @property
    def peak_gb(self) -> float | None:
        """The larger of the two accelerator peaks: what the card must have. None on a CPU."""
        peaks = [peak for peak in (self.load_peak_gb, self.run_peak_gb) if peak is not None]
        return max(peaks, default=None)

    @property
    def spread_s(self) -> float | None:
        """The slowest of the later calls less the fastest."""
        return max(self.latencies_s) - min(self.latencies_s) if self.latencies_s else None

    @property
    def resolution(self) -> str:
        """Width x height in pixels."""
        return f"{self.width}x{self.height}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measurement":
        """The reverse of `to_dict`.

        Raises:
            TutorialError: a field is unknown, or `name` is missing.
        """
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown or "name" not in values:
            problem = f"has unknown fields ({', '.join(unknown)})" if unknown else "has no field name"
            raise TutorialError(f"A recorded measurement {problem}: measure it again with this version of the lessons.")
        if values.get("latencies_s") is not None:
            values = values | {"latencies_s": tuple(values["latencies_s"])}  # JSON has no tuples
        return cls(**values)


def measurement(
    name: str,
    checkpoint: Checkpoint,
    load: Load | None = None,
    run: Run | None = None,
    pipeline: Any | None = None,
    **changes: Any,
) -> Measurement:
    """Put together what `measure_load` and `measure_run` returned with where and on what it was measured.

    `pipeline` gives `footprint_gb`. `changes` are fields that differ from the checkpoint's, such as `steps=4`.
    """
    values: dict[str, Any] = {
        "name": name,
        **environment(),
        "model": checkpoint.model,
        "checkpoint_size": checkpoint.size,
        "height": checkpoint.height,
        "width": checkpoint.width,
        "steps": checkpoint.num_inference_steps,
        "frames": checkpoint.num_frames,
        "seed": checkpoint.seed,
        "call": checkpoint.call_arguments,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if load is not None:
        values |= {"load_s": load.load_s, "load_peak_gb": load.load_peak_gb}
    if run is not None:
        names = ("first_call_s", "latency_s", "step_ms", "run_peak_gb")
        values |= {entry: getattr(run, entry) for entry in names}
        values |= {"repeats": len(run.latencies), "warmups": run.warmups, "latencies_s": run.latencies}
    values["host_peak_gb"] = max((part.host_peak_gb for part in (load, run) if part is not None), default=None)
    if pipeline is not None:
        values["footprint_gb"] = sum(sum(sizes.values()) for sizes in component_footprints(pipeline).values()) / GB
    return Measurement(**(values | changes))


def save_measurements(measurements: Sequence[Measurement], path: str | Path) -> None:
    """Write measurements to a JSON file, one object each."""
    write_json([entry.to_dict() for entry in measurements], path)


def write_json(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Write rows to a JSON file in one go: a stop half-way, or a full disk, leaves the old file as it was."""
    text = json.dumps(rows, indent=2)
    part = Path(path).with_suffix(".part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_measurements(path: str | Path) -> list[Measurement]:
    """Read what `save_measurements` wrote."""
    return [Measurement.from_dict(values) for values in json.loads(Path(path).read_text(encoding="utf-8"))]


def with_distances(measurements: Sequence[Measurement], path: str | Path) -> list[Measurement]:
    """The measurements, each with the `distance` of the row of its name in another file.

    For random weights, whose pictures are noise: the distance is that of the pocket model's picture.

    Raises:
        KeyError: the file has no row of that name.
    """
    distances = {entry.name: entry.distance for entry in load_measurements(path)}
    return [replace(entry, distance=distances[entry.name]) for entry in measurements]


def provenance(measurements: Sequence[Measurement]) -> str:
    """Where, with what, on what and when these were measured, in one line. All but the dates are those of the first."""
    first = measurements[0]
    drawn = first.resolution if first.frames is None else f"{first.frames} frames of {first.resolution}"
    repeats = "1 repeat" if first.repeats == 1 else f"{first.repeats} repeats"
    dates = sorted({entry.date for entry in measurements})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{first.device}, torch {first.torch}, {drawn}, {first.steps} steps, {repeats}, {when}"


def environment() -> dict[str, str | None]:
    """Device, driver and versions of the libraries, by the field names of `Measurement`."""
    versions = {name: metadata.version(name) for name in ("diffusers", "transformers", "bitsandbytes")}
    # Unlike its metadata, torch itself always names its build, such as +cpu.
    return {"device": device_name(), "driver": _driver_version(), "torch": str(torch.__version__), **versions}


def device_name() -> str:
    """Name of the accelerator, or of the CPU with the number of threads that PyTorch uses."""
    device = accelerator()
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    if device.type == "xpu":
        return torch.xpu.get_device_name()
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    if accelerator().type != "cuda" or torch.version.hip is not None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n", 1)[0].strip() or None


# A process of its own


def run_in_fresh_process(
    function: Callable[..., Any] | str,
    arguments: dict[str, Any] | None = None,
    timeout_s: float = 1800,
    name: str | None = None,
) -> Any:
    """Call `function` in a new Python process, so that no memory, cache or peak of this one is in its figures.

    `function` is "module:function", or a function; one that is defined in a notebook or a script travels as its source,
    so it must import what it uses in its body. `arguments` are keyword arguments, and they and the result must fit in
    JSON; a `Measurement` as the result comes back as one. Errors call it `name`, or by the name of the function.

    Raises:
        TutorialError: the process failed, ran out of memory or took longer than `timeout_s`. What it wrote to stderr is
            written to stderr here.
    """
    name = name or (function if isinstance(function, str) else function.__name__)
    job = {"arguments": arguments or {}, "sys_path": sys.path, **_locate(function)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            job_file = Path(folder, "job.json")
            job_file.write_text(json.dumps(job), encoding="utf-8")
            result_file = Path(folder, "result.json")
            script = Path(__file__).with_name("fresh_process.py")
            command = [sys.executable, str(script), str(job_file), str(result_file), str(os.getpid())]
            process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
            if process.returncode == 0:
                result = json.loads(result_file.read_text(encoding="utf-8"))
                return Measurement.from_dict(result["value"]) if result["is_measurement"] else result["value"]
    except subprocess.TimeoutExpired:
        raise TutorialError(
            f"{name} did not finish in {timeout_s:.0f} s in its own process: raise the timeout, or use fewer steps."
        ) from None
    except OSError as error:
        raise TutorialError(
            f"{name} cannot have a process of its own ({error.strerror}): free some space and memory, or set TMPDIR."
        ) from None
    print(process.stdout, end="")
    print(process.stderr, end="", file=sys.stderr)
    raise TutorialError(explain_failure(name, process.returncode, process.stderr))


def measure_in_fresh_process(
    load: Callable[..., Any] | str,
    checkpoint: Checkpoint,
    name: str,
    arguments: dict[str, Any] | None = None,
    repeats: int = 3,
    warmups: int = 0,
    picture: str | Path | None = None,
    timeout_s: float = 1800,
) -> Measurement:
    """Load a pipeline with `load(**arguments)` and draw with it, all in a new process; returns the measurement.

    `load` travels as in `run_in_fresh_process`. It returns the pipeline, ready to be called; or the pipeline and a
    dictionary of arguments to call it with besides those of the checkpoint, of which None removes one. `repeats` and
    `warmups` are those of `measure_run`. With `picture`, a file name ending in .png, the last image is written there, a
    video as its frames in a row. Height, width and frames of the measurement are those of what was drawn.

    Raises:
        TutorialError: as `run_in_fresh_process`.
    """
    job = {
        "load": _locate(load),
        "arguments": arguments or {},
        "checkpoint": asdict(checkpoint),
        "name": name,
        "repeats": repeats,
        "warmups": warmups,
        "picture": None if picture is None else str(Path(picture).absolute()),
    }
    return run_in_fresh_process("helpers.measure:_load_and_run", job, timeout_s, name)


def _load_and_run(
    load: dict, arguments: dict, checkpoint: dict, name: str, repeats: int, warmups: int, picture: str | None
) -> Measurement:
    """What `measure_in_fresh_process` does in the other process."""
    cpu_backend.enable()
    settings = Checkpoint(**checkpoint | {"prompts": tuple(checkpoint["prompts"])})
    loaded, load_figures = measure_load(lambda: fresh_process.find(load)(**arguments))
    pipeline, changes = loaded if isinstance(loaded, tuple) else (loaded, {})
    pipeline.set_progress_bar_config(disable=True)
    call = {key: value for key, value in (settings.call_arguments | changes).items() if value is not None}

    def draw() -> Any:
        return pipeline(**call, generator=torch.Generator("cpu").manual_seed(settings.seed))

    run = measure_run(draw, repeats=repeats, warmups=warmups, pipeline=pipeline)
    drawn = {} if call.get("output_type") == "latent" else _drawn(pipeline, run.output, picture)
    drawn["steps"] = call.get("num_inference_steps")
    drawn["call"] = {key: value for key, value in call.items() if isinstance(value, (str, int, float))}
    return measurement(name, settings, load_figures, run, pipeline, **drawn)


def _drawn(pipeline: Any, output: Any, picture: str | None) -> dict[str, int | None]:
    """Height, width and frames of what a pipeline returned; the picture, or the frames in a row, go to a file."""
    kind = next((kind for kind in ("frames", "images", "image") if hasattr(output, kind)), None)
    if kind is None:
        raise TutorialError(f"{type(pipeline).__name__} returns neither images nor frames: measure another checkpoint.")
    drawn = getattr(output, kind)
    frames = [_as_picture(frame) for frame in (drawn[0] if kind == "frames" else drawn[:1])]
    if picture is not None:
        Image.fromarray(np.concatenate([np.asarray(frame.convert("RGB")) for frame in frames], axis=1)).save(picture)
    count = len(frames) if kind == "frames" else None
    return {"height": frames[0].height, "width": frames[0].width, "frames": count}


def _as_picture(frame: Image.Image | np.ndarray) -> Image.Image:
    """A frame as a picture; video pipelines return arrays of floats in 0..1 or pictures."""
    if isinstance(frame, Image.Image):
        return frame
    return Image.fromarray((255 * np.nan_to_num(frame)).round().clip(0, 255).astype(np.uint8))


def _locate(function: Callable[..., Any] | str) -> dict[str, str]:
    """How the other process finds the function."""
    if isinstance(function, str):
        module, _, attribute = function.partition(":")
        return {"module": module, "function": attribute}
    if function.__module__ != "__main__" and "<locals>" not in function.__qualname__:
        return {"module": function.__module__, "function": function.__qualname__}
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise TutorialError(
            f"{function.__name__} uses variables of the function around it ({names}), which another process does not "
            "have: pass them as arguments."
        )
    return {"source": textwrap.dedent(inspect.getsource(function)), "function": function.__name__}


def explain_failure(name: str, returncode: int, stderr: str) -> str:
    """One sentence for a process that failed, by its exit status and what it wrote to stderr."""
    if returncode < 0:
        reason = signal.Signals(-returncode).name
        if reason == "SIGKILL":
            return (
                f"{name} was killed in its own process (SIGKILL), most often because host memory ran out: close other "
                "programs or use a smaller checkpoint."
            )
        return f"{name} was stopped in its own process by {reason}: see the output above."
    lines = [line for line in stderr.splitlines() if line.strip()] or [f"exit status {returncode}"]
    # The first line of the last error: its message may go on for many.
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    last = (errors or lines)[-1].partition(" Stack trace:")[0]  # torch's errors about CUDA graphs go on with one
    prefix = f"{TutorialError.__module__}.{TutorialError.__name__}: "
    if last.startswith(prefix):
        return last.removeprefix(prefix)
    if "OutOfMemoryError" in last or "CUDA error: out of memory" in last:
        return f"{name} ran out of accelerator memory in its own process ({_card()}): use a technique that needs less."
    return f"{name} failed in its own process: {last.rstrip('.')}; see the output above."

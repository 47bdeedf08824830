"""The accelerator of this machine, its memory in use, what the components of a pipeline weigh, what this machine is.

GB is 1e9 bytes.
"""

import contextlib
import ctypes
import gc
import platform
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.collect_env import get_nvidia_driver_version, run

from helpers.errors import TutorialError

GB = 1e9
PAGE = 20 * 2**20  # bytes by which PyTorch's expandable segments grow
_reserved = 0  # bytes: the highest that `reserved_gb` has read so far


def accelerator() -> torch.device:
    """The device that the lessons run on: the accelerator of this machine, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize() -> None:
    """Wait until the accelerator has done all its work. Its work is asynchronous: time nothing without this."""
    if accelerator().type != "cpu":
        torch.accelerator.synchronize()


def has_memory_statistics() -> bool:
    """Whether PyTorch counts the memory of this machine's accelerator."""
    return accelerator().type not in ("cpu", "mps")


def memory_gb() -> float:
    """Memory in use now, in GB: allocated accelerator memory, or on a CPU the resident memory of this process."""
    if has_memory_statistics():
        return torch.accelerator.memory_allocated() / GB
    return psutil.Process().memory_info().rss / GB


def reserved_gb() -> float | None:
    """Highest memory in GB that PyTorch had reserved on the accelerator since this process began; None without one.

    What resets PyTorch's own counter must call this first: it remembers the highest figure that it has seen.
    """
    global _reserved
    if not has_memory_statistics():
        return None
    _reserved = max(_reserved, torch.accelerator.max_memory_reserved())
    return _reserved / GB


def limit_memory(limit_gb: float) -> None:
    """Let PyTorch reserve no more than this on a CUDA card, whatever happens; elsewhere it does nothing.

    PyTorch compares before it rounds up to whole pages: without a page less, a limit of 8 GB gave 8.015.
    """
    if accelerator().type == "cuda":
        total = torch.accelerator.get_memory_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, limit_gb * GB - PAGE) / total))


def free_memory() -> float:
    """Give back memory that nothing refers to any more. Returns `memory_gb()`, for the check that it is free.

    Delete your own variables first (`del pipeline`), in a notebook also `_` if a cell displayed one of them.
    """
    gc.collect()  # pipelines and hooks refer to each other, so that reference counting alone frees nothing
    if has_memory_statistics():
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
    return memory_gb()


def weights_alive_gb() -> float:
    """GB of the parameters that something still refers to, on any device, a CPU too: 0 after `free_memory`."""
    # By their type: asking an object itself, as isinstance does, would wake what is imported lazily.
    weights = [entry for entry in gc.get_objects() if issubclass(type(entry), torch.nn.Parameter)]
    return sum(weight.nbytes for weight in weights if weight.device.type != "meta") / GB


def footprint(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of the weights of `module` by kind, largest first: a dtype such as "bfloat16", "nf4", or "quant_state".

    "nf4" are the packed 4-bit weights of bitsandbytes. "quant_state" is what it needs besides to read them: one scale
    (absmax) per block of 64 weights and a few small tables. "float8_e4m3fn" is torchao's, whose scales are float32.
    Tensors that share memory count once.
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
            for part in _plain(tensor):
                add(str(part.dtype).removeprefix("torch."), part)
            continue
        add(state.quant_type, tensor)
        # With double quantization absmax is itself quantized: state2 holds the scales of the scales.
        for part in (state, state.state2) if state.nested else (state,):
            add("quant_state", part.absmax)
            add("quant_state", part.code)
        if state.nested:
            add("quant_state", state.offset)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes of one: torchao's, which say that they are bfloat16, wrap several."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in _plain(getattr(tensor, name))]


def component_footprints(pipeline: Any) -> dict[str, dict[str, int]]:
    """`footprint` of each component of a diffusers pipeline that has weights, in the order of `pipeline.components`."""
    return {name: footprint(module) for name, module in component_modules(pipeline).items()}


def fits(pipeline: Any) -> bool:
    """Whether all components of a pipeline fit on the accelerator at once, with a fifth of it left for activations."""
    if not has_memory_statistics():
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
    """Turn `torch.OutOfMemoryError` in the block into a TutorialError, and free what the block had allocated.

    `technique` says what needs less memory: it completes "use ...".
    """
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        # The traceback holds on to the local variables of every frame, and with them to the tensors.
        traceback.clear_frames(error.__traceback__)
        message = f"The accelerator is out of memory ({card()}): use {technique}, then restart the kernel."
    free_memory()
    raise TutorialError(message)


def card() -> str:
    """Name and memory of the accelerator, for a sentence."""
    if not has_memory_statistics():
        return device_name()
    free, total = torch.accelerator.get_memory_info()
    return f"{device_name()}, {free / GB:.1f} of {total / GB:.1f} GB free"


def environment() -> dict[str, str | None]:
    """Device, driver and versions of the libraries, by the field names of `Measurement`."""
    versions = {name: metadata.version(name) for name in ("diffusers", "transformers", "bitsandbytes")}
    driver = get_nvidia_driver_version(run) if accelerator().type == "cuda" else None
    # Unlike its metadata, torch itself always names its build, such as +cpu.
    return {"device": device_name(), "driver": driver, "torch": str(torch.__version__), **versions}


def device_name() -> str:
    """Name of the accelerator, or of the CPU with the number of threads that PyTorch uses."""
    device = accelerator()
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return torch.get_device_module(device).get_device_name() if has_memory_statistics() else device.type


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

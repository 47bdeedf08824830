"""Lets the bitsandbytes path of diffusers run on a machine with no GPU.

bitsandbytes quantizes to nf4 and computes with it on a CPU, and transformers allows that; diffusers 0.42 refuses to
load a 4-bit model without a GPU. `enable` puts a subclass that accepts the CPU into the table in which diffusers looks
up its quantizers. With a GPU it changes nothing.
"""

from typing import Any

import torch

from helpers.errors import TutorialError


def has_gpu() -> bool:
    """Whether diffusers finds a GPU to quantize on. The same test as in its `BnB4BitDiffusersQuantizer`."""
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.mps.is_available()


def enable() -> None:
    """Make nf4 loading work on this machine if it has no GPU. Calling it again, or with a GPU, does nothing."""
    if has_gpu():
        return

    # Imported here, so that a machine with a GPU pays nothing for it.
    import bitsandbytes.nn.modules
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
    from diffusers.quantizers.bitsandbytes.utils import dequantize_and_replace

    # On CPUs with AVX512-BF16, `Linear4bit` changes the layout of its weight inside the first forward. torch.compile
    # has by then recorded the old one, and fails with a size/stride assertion; and the kernel rounds in another way.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

    class CPUBnB4BitDiffusersQuantizer(BnB4BitDiffusersQuantizer):
        """diffusers' nf4 quantizer for a machine with no GPU."""

        def validate_environment(self, *args, **kwargs):
            pass  # the parent asks for a GPU here, and for versions that are far below ours

        def update_device_map(self, device_map: dict | None) -> dict:
            return {"": "cpu"} if device_map is None else device_map

        def _dequantize(self, model: torch.nn.Module):
            # The parent moves a model that is on the CPU to the GPU first.
            skipped = self.modules_to_not_convert
            return dequantize_and_replace(model, skipped, quantization_config=self.quantization_config)

    if AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is BnB4BitDiffusersQuantizer:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = CPUBnB4BitDiffusersQuantizer


def fix_sequential_offload(pipeline: Any) -> None:
    """Make `pipeline.enable_sequential_cpu_offload(device="cpu")` run. Call it right after; with a GPU it does nothing.

    diffusers names the device "cpu:0", and a copy of a parameter from "cpu" to "cpu:0" is no parameter any more, which
    accelerate trips over. This names it "cpu" in accelerate's hooks. No such thing happens with a GPU.
    """
    if has_gpu():
        return
    for component in pipeline.components.values():
        for module in component.modules() if isinstance(component, torch.nn.Module) else ():
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                if getattr(part, "execution_device", None) is not None:
                    part.execution_device = torch.device("cpu")


def check_compiler() -> None:
    """Check that torch.compile will find a C++ compiler, which it needs on a CPU and not on a GPU.

    TorchInductor itself looks: for the compiler that the environment variable CXX names, else for g++
    (https://docs.pytorch.org/docs/stable/torch.compiler_faq.html). Raises TutorialError if there is none.
    """
    if has_gpu():
        return
    from torch._inductor import config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except (RuntimeError, OSError):
        name = config.cpp.cxx if isinstance(config.cpp.cxx, str) else config.cpp.cxx[-1]  # the first is one from conda
        raise TutorialError(
            f"torch.compile on a CPU needs a C++ compiler and {name} was not found: install one with "
            "`sudo apt install g++`, or set the environment variable CXX to yours, and restart the kernel."
        ) from None

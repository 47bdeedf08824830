"""Lets the bitsandbytes path of diffusers run on a machine with no GPU.

bitsandbytes quantizes to nf4 and computes with it on a CPU, and transformers allows that; diffusers 0.42 refuses to
load a 4-bit model without a GPU. `enable` puts a subclass that accepts the CPU into the table in which diffusers, and
transformers likewise, looks up its quantizers. With a GPU it changes nothing.
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
    import diffusers.quantizers.auto
    import transformers.quantizers.auto
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
    from diffusers.quantizers.bitsandbytes.utils import dequantize_and_replace
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class CPUBnB4BitDiffusersQuantizer(BnB4BitDiffusersQuantizer):
        """diffusers' nf4 quantizer for a machine with no GPU."""

        def validate_environment(self, *args, **kwargs):
            pass  # the parent asks for a GPU here, and for versions that are far below ours

        def update_device_map(self, device_map: dict | None) -> dict:
            return {"": "cpu"} if device_map is None else device_map

        def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs):
            return keep_nf4_layout(super()._process_model_after_weight_loading(model, **kwargs))

        def _dequantize(self, model: torch.nn.Module):
            # The parent moves a model that is on the CPU to the GPU first.
            return dequantize_and_replace(
                model, self.modules_to_not_convert, quantization_config=self.quantization_config
            )

    class CPUBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
        """transformers' nf4 quantizer, which runs on a CPU, with the layout of the weights kept as on a GPU."""

        def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs):
            return keep_nf4_layout(super()._process_model_after_weight_loading(model, **kwargs))

    # `transformers.quantizers.auto.register_quantizer` only adds new names; these replace an entry, once.
    for mapping, ours in (
        (diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING, CPUBnB4BitDiffusersQuantizer),
        (transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING, CPUBnb4BitHfQuantizer),
    ):
        if mapping["bitsandbytes_4bit"] is ours.__base__:
            mapping["bitsandbytes_4bit"] = ours


def keep_nf4_layout(module: torch.nn.Module) -> torch.nn.Module:
    """Switch off the repacking of nf4 weights that bitsandbytes does on CPUs with AVX512-BF16. Returns `module`.

    There, `Linear4bit` changes the layout of its weight inside the first forward. torch.compile has by then recorded
    the old layout, and fails with a size/stride assertion; and the repacked kernel rounds differently from other CPUs.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return module


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

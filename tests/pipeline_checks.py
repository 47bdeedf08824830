"""Says what a program did: from its pipeline, and from a `Spy` on the calls that leave no trace on the pipeline."""

import builtins
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import DiffusionPipeline, ModelMixin

from helpers import devices


@dataclass
class Spy:
    """What a program asked for, besides what the pipeline shows.

    Attributes:
        compiled: the keyword arguments of each torch.compile; nothing is compiled, the graphs are recorded.
        sent: ids of the components that the program moved to the device itself.
        memory_formats: those that it asked for.
    """

    device: torch.device
    compiled: list[dict[str, Any]] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)
    memory_formats: list[torch.memory_format] = field(default_factory=list)

    def run(self, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Execute a program; returns its names."""
        names, compile_it = {"__builtins__": vars(builtins)}, torch.compile

        def compile_eagerly(function, **settings):
            self.compiled.append(settings)
            return compile_it(function, **settings | {"backend": "eager"})

        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile_eagerly)
            for cls in (torch.nn.Module, ModelMixin, DiffusionPipeline):
                patch.setattr(cls, "to", self._watch_to(cls.to))
            exec(code, names)
        return names

    def _watch_to(self, to: Any) -> Any:
        def watched(thing, *args, **settings):
            if "__name__" not in sys._getframe(1).f_globals:  # the program itself, which has no name
                self.memory_formats += [settings["memory_format"]] if "memory_format" in settings else []
                if self.device in [torch.device(arg) for arg in args if isinstance(arg, (str, torch.device))]:
                    parts = thing.components.values() if isinstance(thing, DiffusionPipeline) else [thing]
                    self.sent |= {id(part) for part in parts}
            return to(thing, *args, **settings)

        return watched


class Fp8Weight(torch.Tensor):
    """A weight in float8 with a scale for each row, wrapped as torchao wraps it; it can be moved, and no more."""

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.bfloat16, device=qdata.device)

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor) -> None:
        self.qdata, self.scale = qdata, scale

    def __tensor_flatten__(self):
        return ["qdata", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(**parts)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            device = (kwargs or {}).get("device")
            return cls(args[0].qdata.to(device=device), args[0].scale.to(device=device))
        raise NotImplementedError(function)


def as_fp8(weight: torch.Tensor) -> torch.nn.Parameter:
    """A weight as a start in fp8 has it, where torchao is not installed."""
    scale = weight.detach().float().abs().amax(1, keepdim=True) / 448
    return torch.nn.Parameter(Fp8Weight((weight / scale).to(torch.float8_e4m3fn), scale), requires_grad=False)


def unquantized(module: torch.nn.Module) -> list[str]:
    """The linear layers of a component that are not nf4 with bfloat16 arithmetic, by name."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not (
            isinstance(layer, Linear4bit)
            and layer.weight.quant_state.quant_type == "nf4"
            and layer.compute_dtype == torch.bfloat16
        )
    ]


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    """The dtypes of a component's weights, of those that its class keeps in float32 none; nf4 is uint8."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or []
    return {weight.dtype for name, weight in module.named_parameters() if not any(word in name for word in kept)}


def left_on_host(pipeline: DiffusionPipeline, spy: Spy) -> set[str]:
    """The components that the program did not send to the card."""
    return {name for name, part in devices.component_modules(pipeline).items() if id(part) not in spy.sent}


def blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a denoiser."""
    lists = [child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList)]
    return [block for child in lists for block in child]

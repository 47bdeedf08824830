"""Says what a program did: from its pipeline, and from a `Spy` on the calls that leave no trace on the pipeline.

A CPU has no streams and one place for everything, so that much of what a program asks for is seen only as it is asked.
"""

import builtins
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import diffusers.hooks
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks import HookRegistry
from transformers import PreTrainedModel

from helpers import devices


@dataclass
class Spy:
    """What a program asked for, besides what the pipeline shows.

    Attributes:
        allocator: PYTORCH_ALLOC_CONF when the program imported torch or a library that does.
        device_maps: `device_map` of each component that the program loaded, by the name of its folder.
        loaded: those components, by the same names.
        compiled: the keyword arguments of each torch.compile; nothing is compiled, the graphs are recorded.
        offloaded: the settings of group offload, by the id of the component.
        sent: ids of the components and quant_states that the program moved to the device itself.
        memory_formats: those that it asked for.
    """

    device: torch.device
    allocator: str | None = None
    device_maps: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, torch.nn.Module] = field(default_factory=dict)
    compiled: list[dict[str, Any]] = field(default_factory=list)
    offloaded: dict[int, dict[str, Any]] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    memory_formats: list[torch.memory_format] = field(default_factory=list)
    imported: bool = False

    def run(self, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Execute a program; returns its names."""
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        names = {"__builtins__": vars(builtins) | {"__import__": self._import}}
        with monkeypatch.context() as patch:
            self._watch(patch)
            exec(code, names)
        return names

    def _import(self, name: str, *args) -> Any:
        if not self.imported and name.split(".")[0] in ("torch", "diffusers", "transformers"):
            self.imported, self.allocator = True, os.environ.get("PYTORCH_ALLOC_CONF")
        return builtins.__import__(name, *args)

    def _watch(self, patch: pytest.MonkeyPatch) -> None:
        compile_it, apply = torch.compile, diffusers.hooks.apply_group_offloading

        def compile_eagerly(function, **settings):
            self.compiled.append(settings)
            return compile_it(function, **settings | {"backend": "eager"})

        def offload(module, *args, **settings):
            self.offloaded[id(module)] = settings
            streams = {} if self.device.type != "cpu" else {"use_stream": False, "record_stream": False}
            return apply(module, *args, **settings | streams)

        patch.setattr(torch, "compile", compile_eagerly)
        patch.setattr(diffusers.hooks, "apply_group_offloading", offload)
        for cls in (torch.nn.Module, ModelMixin, PreTrainedModel, QuantState, DiffusionPipeline):
            patch.setattr(cls, "to", self._watch_to(cls.to))
        for cls in (ModelMixin, PreTrainedModel):
            patch.setattr(cls, "from_pretrained", classmethod(self._watch_load(cls.from_pretrained.__func__)))

    def _watch_to(self, to: Any) -> Any:
        def watched(thing, *args, **settings):
            if called_by_program():
                self.memory_formats += [settings["memory_format"]] if "memory_format" in settings else []
                if torch.device(self.device) in [
                    torch.device(arg) for arg in args if isinstance(arg, (str, torch.device))
                ]:
                    parts = thing.components.values() if isinstance(thing, DiffusionPipeline) else [thing]
                    self.sent |= {id(part) for part in parts}
            return to(thing, *args, **settings)

        return watched

    def _watch_load(self, load: Any) -> Any:
        def watched(cls, path, **settings):
            part = load(cls, path, **settings)
            if called_by_program():
                self.device_maps[settings["subfolder"]] = settings.get("device_map")
                self.loaded[settings["subfolder"]] = part
            return part

        return watched


def called_by_program() -> bool:
    """Whether the caller of the caller is a program, which has no name, or the part of it that `benchmarks` holds."""
    return sys._getframe(2).f_globals.get("__name__", "benchmarks").startswith("benchmarks")


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


def placement(pipeline: DiffusionPipeline, spy: Spy) -> dict[str, str]:
    """Where each component is: "model offload", "leaf_level", "block_level", "on the card" or "left in host memory"."""
    places = {}
    for name, part in devices.component_modules(pipeline).items():
        settings = spy.offloaded.get(id(part))
        if getattr(part, "_hf_hook", None) is not None:
            places[name] = "model offload"
        elif settings is not None and has_group_hooks(part):
            places[name] = settings["offload_type"]
        else:
            places[name] = "on the card" if id(part) in spy.sent else "left in host memory"
    return places


def has_group_hooks(module: torch.nn.Module) -> bool:
    """Whether group offload moves anything of a component."""
    hooks = (getattr(layer, "_diffusers_hook", None) for layer in module.modules())
    return any(registry.get_hook("group_offloading") is not None for registry in hooks if registry is not None)


def streams(pipeline: DiffusionPipeline, spy: Spy) -> dict[str, set[str]]:
    """The stream settings that group offload was asked for, by component."""
    return {
        name: {key for key in ("use_stream", "record_stream") if spy.offloaded[id(part)].get(key)}
        for name, part in devices.component_modules(pipeline).items()
        if id(part) in spy.offloaded
    }


def quant_states_sent(module: torch.nn.Module, spy: Spy) -> bool:
    """Whether the program moved the quant_state of every nf4 weight to the card."""
    states = [layer.weight.quant_state for layer in module.modules() if isinstance(layer, Linear4bit)]
    return bool(states) and all(id(state) in spy.sent for state in states)


def rest_stays(denoiser: torch.nn.Module) -> bool:
    """Whether block-level group offload leaves what is outside of the blocks on the card."""
    return HookRegistry.check_if_exists_or_initialize(denoiser).get_hook("group_offloading").group.modules == []


def blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a denoiser."""
    lists = [child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList)]
    return [block for child in lists for block in child]

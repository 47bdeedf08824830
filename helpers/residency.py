"""When each component of a pipeline is on the accelerator."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from helpers.devices import accelerator, component_modules, footprint


@dataclass
class Residency:
    """One stay of a component on the accelerator.

    Attributes:
        component: its name in the pipeline.
        onload_s, offload_s: seconds since the recording began, when its first weight came and its last one left (or the
            recording ended).
        bytes: most bytes of it there at once.
        moved_bytes: bytes copied there in all. Larger than `bytes` where pieces come and go, once for each step.
        onloads: number of those copies.
    """

    component: str
    onload_s: float
    offload_s: float
    bytes: int
    moved_bytes: int
    onloads: int


class _Recorder:
    """Turns "this piece came, that piece left" into stays."""

    def __init__(self, events: list[Residency]) -> None:
        self.events = events
        self.start = time.perf_counter()
        self.held: dict[str, dict[int, int]] = {}  # component -> piece -> bytes

    def now(self) -> float:
        return time.perf_counter() - self.start

    def onload(self, component: str, piece: int, size: int) -> None:
        held = self.held.setdefault(component, {})
        if piece in held:
            return
        # Pieces of one component that come and go, with no other component in between, are one stay.
        if not held and (not self.events or self.events[-1].component != component):
            self.events.append(Residency(component, self.now(), self.now(), 0, 0, 0))
        held[piece] = size
        event = self.last(component)
        event.bytes = max(event.bytes, sum(held.values()))
        event.moved_bytes += size
        event.onloads += 1

    def offload(self, component: str, piece: int) -> None:
        if self.held.get(component, {}).pop(piece, None) is not None:
            self.last(component).offload_s = self.now()

    def last(self, component: str) -> Residency:
        return next(event for event in reversed(self.events) if event.component == component)

    def finish(self) -> None:
        for component, held in self.held.items():
            if held:
                self.last(component).offload_s = self.now()


@contextlib.contextmanager
def record_residency(pipeline: Any) -> Iterator[list[Residency]]:
    """Record which component of a diffusers pipeline is on the accelerator when, under any offloading or none.

    Yields a list that holds, once the block is left, one `Residency` per stay, in order of onloading. It watches the
    hooks that move the weights: accelerate's `CpuOffload` (`enable_model_cpu_offload`) and `AlignDevicesHook`
    (`enable_sequential_cpu_offload`), and diffusers' `ModuleGroup` (group offloading). So on a machine with no
    accelerator, where the same hooks copy nothing, order and bytes are those of a machine that has one. A component
    with no such hook stays from the beginning to the end.

    Turn offloading on before the block. The times are those of the host: a copy that is asynchronous is over later.
    Record an eager pipeline: dynamo sees watched hooks as changed ones, and compiles once more for them.
    """
    modules = component_modules(pipeline)
    names = {id(module): name for name, module in modules.items()}
    events: list[Residency] = []
    recorder = _Recorder(events)
    watched: list[tuple[Any, str]] = []  # (object, name of the method that an attribute of the object now hides)
    undisturbed = []

    def watch(target: Any, method: str, before: Callable = None, after: Callable = None) -> None:
        original = getattr(target, method)

        @torch.compiler.disable  # as the hooks themselves are: never traced
        def wrapper(*args, **kwargs):
            if before is not None:
                before()
            result = original(*args, **kwargs)
            if after is not None:
                after()
            return result

        setattr(target, method, wrapper)
        watched.append((target, method))

    def watch_model_offload(name: str, module: torch.nn.Module, hook: Any) -> None:
        size = sum(footprint(module).values())

        def come() -> None:
            if hook.prev_module_hook is not None:
                leave(names[id(hook.prev_module_hook.model)])
            recorder.onload(name, id(module), size)

        watch(hook, "pre_forward", before=come)

    def leave(name: str) -> None:
        recorder.offload(name, id(modules[name]))

    def watch_all_model_offloads() -> bool:
        found = False
        for name, module in modules.items():
            for hook in _accelerate_hooks(module):
                if type(hook).__name__ == "CpuOffload":
                    watch_model_offload(name, module, hook)
                    found = True
        return found

    def end_of_call() -> None:
        # diffusers has moved every component off, and put new hooks in place of the old ones.
        for name in modules:
            leave(name)
        watch_all_model_offloads()

    if watch_all_model_offloads():
        watch(pipeline, "maybe_free_model_hooks", after=end_of_call)
    for name, module in modules.items():
        pieces = list(_pieces(module))
        for target, come, go, size in pieces:
            key = id(target)
            watch(target, come, before=lambda name=name, key=key, size=size: recorder.onload(name, key, size))
            watch(target, go, after=lambda name=name, key=key: recorder.offload(name, key))
        is_offloaded = pieces or any(type(hook).__name__ == "CpuOffload" for hook in _accelerate_hooks(module))
        if not is_offloaded and _device(module).type == accelerator().type:
            undisturbed.append((name, sum(footprint(module).values())))
    try:
        yield events
    finally:
        for target, method in watched:
            vars(target).pop(method, None)
        recorder.finish()
        end = recorder.now()
        events[:0] = [Residency(name, 0.0, end, size, 0, 0) for name, size in undisturbed]


def _device(module: torch.nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _accelerate_hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks that accelerate has put on this one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _pieces(component: torch.nn.Module) -> Iterator[tuple[Any, str, str, int]]:
    """What comes and goes in pieces: (object, method that brings it, method that takes it away, bytes)."""
    groups = {}
    for module in component.modules():
        for hook in _accelerate_hooks(module):
            if getattr(hook, "offload", False) is True:
                parameters = module.parameters(recurse=hook.place_submodules)
                buffers = module.buffers(recurse=hook.place_submodules) if hook.offload_buffers else ()
                yield hook, "pre_forward", "post_forward", _bytes((*parameters, *buffers))
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            group = getattr(hook, "group", None)
            if group is not None:
                groups[id(group)] = group  # many modules share one
    for group in groups.values():
        tensors = [tensor for part in group.modules for tensor in (*part.parameters(), *part.buffers())]
        size = _bytes((*tensors, *group.parameters, *group.buffers))
        if size:  # else nothing comes and goes
            yield group, "onload_", "offload_", size


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    # A group may name a tensor twice, as part of a module and by itself.
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())

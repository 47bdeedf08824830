"""When each component of a pipeline is on the accelerator."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate.hooks import CpuOffload

from helpers.devices import accelerator, component_modules, footprint
from helpers.errors import TutorialError


@dataclass
class Residency:
    """One stay of a component on the accelerator; times are seconds since the recording began."""

    component: str  # its name in the pipeline
    onload_s: float  # when its first weight came
    offload_s: float  # when its last one left, or the recording ended
    bytes: int  # most of it there at once
    moved_bytes: int  # copied there in all: more than `bytes` where pieces come and go, once for each step
    onloads: int  # number of those copies


class _Piece(NamedTuple):
    """What comes and goes as one: a whole component, or what the methods `onload` and `offload` of `target` move."""

    component: str
    target: Any
    bytes: int
    onload: str = ""
    offload: str = ""


class _Recorder:
    """Turns "this piece came, that piece left" into stays."""

    def __init__(self) -> None:
        self.events: list[Residency] = []
        self.last: dict[str, Residency] = {}  # by component
        self.held: dict[str, dict[int, int]] = collections.defaultdict(dict)  # component -> target -> bytes
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def begin(self, component: str, seconds: float) -> None:
        self.last[component] = Residency(component, seconds, seconds, 0, 0, 0)
        self.events.append(self.last[component])

    def already_there(self, piece: _Piece) -> None:
        self.begin(piece.component, 0.0)
        self.held[piece.component][id(piece.target)] = self.last[piece.component].bytes = piece.bytes

    def onload(self, piece: _Piece) -> None:
        held = self.held[piece.component]
        if id(piece.target) in held:
            return
        # Parts of one component that come and go, with no other component in between, are one stay.
        if not held and (not piece.onload or not self.events or self.events[-1].component != piece.component):
            self.begin(piece.component, self.now())
        held[id(piece.target)] = piece.bytes
        event = self.last[piece.component]
        event.bytes = max(event.bytes, sum(held.values()))
        event.moved_bytes += piece.bytes
        event.onloads += 1

    def offload(self, piece: _Piece) -> None:
        if self.held[piece.component].pop(id(piece.target), None) is not None:
            self.last[piece.component].offload_s = self.now()

    def finish(self) -> None:
        end = self.now()
        for component in [name for name, held in self.held.items() if held]:
            self.last[component].offload_s = end


@contextlib.contextmanager
def record_residency(pipeline: Any) -> Iterator[list[Residency]]:
    """Record which component of a diffusers pipeline is on the accelerator when, under any offloading or none.

    Yields a list that holds, once the block is left, one `Residency` per stay, in order of onloading. Turn offloading
    on before the block, and record an eager pipeline: dynamo compiles once more for watched hooks.

    It watches the hooks that move the weights: accelerate's `CpuOffload` (`enable_model_cpu_offload`) and
    `AlignDevicesHook` (`enable_sequential_cpu_offload`), and diffusers' `ModuleGroup` (group offloading). On a CPU they
    copy nothing: order and bytes are those of a machine with an accelerator, and what model offload moves counts as
    away when the block begins. A component with no such hook stays all the time, unless somebody moves it. The hooks
    belong to the components: what another pipeline that shares them says counts too. Times are those of the host: a
    copy that is asynchronous is over later.

    Raises TutorialError if a component was replaced, or its offloading changed, inside the block; or if model offload
    moves some components and leaves one out, of which a CPU does not tell where it is.
    """
    before = _state(pipeline)
    wholes: dict[int, _Piece] = {}  # a component that has two names in the pipeline is there once, by the first
    for name, (module, _, _) in before.items():
        wholes.setdefault(id(module), _Piece(name, module, sum(footprint(module).values())))
    parts = {whole.component: before[whole.component][2] for whole in wholes.values()}
    hooked = {name for name in parts if before[name][1]}
    has_accelerator = accelerator().type != "cpu"
    kept = getattr(pipeline, "_exclude_from_cpu_offload", ())
    lost = [name for name in parts if name not in hooked and name not in kept and not parts[name]]
    if hooked and lost and not has_accelerator:
        raise TutorialError(
            f"Model offload does not move the {lost[0]}, which came to the pipeline later: call "
            "pipeline.enable_model_cpu_offload() once more, then record."
        )
    recorder = _Recorder()
    stack = contextlib.ExitStack()
    stack.callback(recorder.finish)

    def watch(target: Any, method: str, tell: Callable) -> None:
        """Until the end, call `tell` before a method of this one object or class, with the same arguments."""
        original = getattr(target, method)

        @torch.compiler.disable  # as the hooks themselves are: never traced
        def wrapper(*args, **kwargs):
            tell(*args, **kwargs)
            return original(*args, **kwargs)

        stack.enter_context(mock.patch.object(target, method, wrapper))

    def before_forward(hook: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        left = wholes.get(id(hook.prev_module_hook.model)) if hook.prev_module_hook is not None else None
        if left is not None:
            recorder.offload(left)
        if id(module) in wholes:
            recorder.onload(wholes[id(module)])

    def before_move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        whole, device = wholes.get(id(module)), torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or whole is None or parts[whole.component]:  # another dtype, or no matter of this recording
            return
        # With no accelerator, model offload brings to "cpu:0" and takes away to "cpu".
        if device.type == accelerator().type and (has_accelerator or device.index is not None):
            recorder.onload(whole)
        elif has_accelerator or whole.component in hooked:
            recorder.offload(whole)

    # By the class: at the end of each call diffusers puts new hooks in place of the old ones, and accelerate takes what
    # is called `to` away from a module.
    watch(CpuOffload, "pre_forward", before_forward)
    watch(torch.nn.Module, "to", before_move)
    for whole in wholes.values():
        for part in parts[whole.component]:
            watch(part.target, part.onload, lambda *args, part=part, **kwargs: recorder.onload(part))
            watch(part.target, part.offload, lambda *args, part=part, **kwargs: recorder.offload(part))
        is_there = any(weight.device.type == accelerator().type for weight in whole.target.parameters())
        if is_there and not parts[whole.component] and (has_accelerator or whole.component not in hooked):
            recorder.already_there(whole)
    with stack:
        yield recorder.events
    changed = sorted(name for name, state in _state(pipeline).items() if before.get(name) != state)
    if changed:
        raise TutorialError(
            f"The {changed[0]} was replaced, or its offloading changed, while its stays were recorded: do that before "
            "record_residency."
        )


def _state(pipeline: Any) -> dict[str, tuple[torch.nn.Module, bool, list[_Piece]]]:
    """By component: the module, whether model offload moves it, and which parts of it come and go."""
    return {
        name: (module, is_model_offloaded(module), list(_parts(name, module)))
        for name, module in component_modules(pipeline).items()
    }


def is_model_offloaded(module: torch.nn.Module) -> bool:
    """Whether `enable_model_cpu_offload` moves this component, in whichever pipeline it was called."""
    return any(isinstance(hook, CpuOffload) for hook in _hooks(module))


def _hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks that accelerate has put on this one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _parts(name: str, component: torch.nn.Module) -> Iterator[_Piece]:
    """What of a component comes and goes by itself."""
    groups = {}
    for module in component.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False) is True:
                parameters = module.parameters(recurse=hook.place_submodules)
                buffers = module.buffers(recurse=hook.place_submodules) if hook.offload_buffers else ()
                yield _Piece(name, hook, _bytes((*parameters, *buffers)), "pre_forward", "post_forward")
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if getattr(hook, "group", None) is not None:
                groups[id(hook.group)] = hook.group  # many modules share one
    for group in groups.values():
        tensors = [tensor for part in group.modules for tensor in (*part.parameters(), *part.buffers())]
        size = _bytes((*tensors, *group.parameters, *group.buffers))
        if size:  # else nothing comes and goes
            yield _Piece(name, group, size, "onload_", "offload_")


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    # A group may name a tensor twice, as part of a module and by itself.
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())

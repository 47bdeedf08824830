"""Draw with a model that is larger than the card: its blocks wait in host memory and are copied there just in time.

`fill_card(pipeline, limit_gb, ...)` fits a whole pipeline into a limit; `stream_blocks(model, budget_gb)` is the piece
beneath it, for one model. This file needs torch, diffusers and psutil, and nothing else of this project: copy it.
"""

import contextlib
import functools
import itertools
import os
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch.utils._pytree import tree_leaves, tree_map_only

GB = 1e9
HOST = torch.device("cpu")
RING = 2  # the size of the ring, in the largest blocks
SETTINGS = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
EXPANDABLE = "expandable_segments:True" in SETTINGS
SPARE = 1.03  # two equal calls differ by 2 % in what they reserve


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a 4-bit weight (absmax, code, offset), each once."""
    found = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "CB") or torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"{type(tensor).__name__} weights cannot be streamed: load in bfloat16, or in nf4.")
        found[id(tensor)] = tensor
        state = getattr(tensor, "quant_state", None)
        for owner in filter(None, (state, getattr(state, "state2", None))):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    if value._is_view():  # it would keep the file in memory that it was read from
                        setattr(owner, name, value := value.clone())
                    found[id(value)] = value
    return list(found.values())


def find_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost repeated blocks: of the classes that diffusers or transformers name, else the members of lists."""
    names = {*(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1]
    lists = [[*members] for members in lists if len(set(map(type, members))) == 1]
    lists = [[*part] if isinstance(part, torch.nn.ModuleList) else [part] for members in lists for part in members]
    blocks = blocks or [*itertools.chain(*lists)]
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if id(block) not in inner]


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether accelerate or diffusers moves its weights."""
    return hasattr(model, "_hf_hook") or _is_group_offload_enabled(model)


class Parcel:
    """Some tensors of a model side by side in one host buffer, so that one copy brings them all to the card.

    `host` is that buffer, page-locked; None once the tensors stay on the card. `here` says that they are there for
    longer than one use.
    """

    def __init__(self, tensors: list[torch.Tensor], device: torch.device) -> None:
        self.tensors, self.device, self.here = tensors, device, False
        self.sources = [tensor.device for tensor in tensors]
        self.layout, self.bytes = [], 0
        for tensor in tensors:  # each at a round address: a kernel may be chosen by it
            stride = torch.empty_like(tensor, device="meta").stride()
            self.layout.append((tensor.dtype, tensor.shape, stride, self.bytes // tensor.itemsize))
            self.bytes += -(-tensor.nbytes // 256) * 256
        self.host = torch.empty(self.bytes, dtype=torch.uint8)
        self.unpin = weakref.finalize(self.host, pin(self.host, device))
        self.homes = list(self.views(self.host))
        self.pack()

    def views(self, buffer: torch.Tensor, start: int = 0) -> Iterator[torch.Tensor]:
        """The tensors as they lie in a buffer of bytes, from one of them on."""
        typed = {dtype: buffer.view(dtype) for dtype, *_ in self.layout}
        for dtype, shape, stride, offset in self.layout:
            yield typed[dtype].as_strided(shape, stride, start // dtype.itemsize + offset)

    def pack(self) -> None:
        """Put the tensors into the host buffer, those too that others have replaced since."""
        for tensor, home in zip(self.tensors, self.homes, strict=True):
            if tensor.data_ptr() != home.data_ptr():
                tensor.data = home.copy_(tensor.data)

    def point(self, views: Any) -> None:
        """Let the model use other copies. The tensors remain the same objects, as compiled code demands."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def visit(self, memory: torch.Tensor, start: int = 0) -> None:
        """Come to the card, into this memory. `leave` takes no copy back: weights do not change."""
        self.pack()
        memory[start:][: self.bytes].copy_(self.host, non_blocking=True)
        self.point(self.views(memory, start))
        self.here = True

    def leave(self) -> None:
        """Back to the host buffer, unless all is to stay."""
        self.point(self.homes or [tensor.data for tensor in self.tensors])
        self.here = self.host is None

    def stay(self) -> int:
        """Come to the card for good, and free the host buffer. Returns its bytes."""
        self.visit(torch.empty(self.bytes, dtype=torch.uint8, device=self.device))
        self.unpin()
        self.host = self.homes = None
        return self.bytes

    def restore(self) -> None:
        """Bring all tensors back to the devices that they came from."""
        for tensor, source in zip(self.tensors, self.sources, strict=True):
            tensor.data = tensor.data.to(source)
        self.unpin()
        self.host = self.homes = None


def pin(buffer: torch.Tensor, device: torch.device) -> Callable[[], Any]:
    """Page-lock a host buffer at its exact size (torch's own way takes a power of two). Returns what undoes it."""
    if device.type != "cuda" or not buffer.nbytes:
        return int
    address = buffer.data_ptr()
    if int(torch.cuda.cudart().cudaHostRegister(address, buffer.nbytes, 0)) == 0:
        return lambda: (torch.cuda.synchronize(device), torch.cuda.cudart().cudaHostUnregister(address))
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)  # CUDA reports the refusal once more, with the next kernel
    warnings.warn("The system page-locks no more host memory (see `ulimit -l`): copies are slower.", stacklevel=2)
    return int


class Ring:
    """Room on the card through which parcels pass, always the same bytes, like a tape in a loop.

    Copies run on a stream of their own, in the order of the last time, as far ahead as there is room. One event says
    when a copy has arrived, another when the computation has done with it and its room can be filled again.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device, self.size, self.memory = torch.empty(0, device=device).device, 0, None
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.queue, self.used = deque(), deque()  # (parcel, start, copied event) and (start, done event)
        self.following, self.guests, self.peaks = {}, [], None
        self.reset()

    @torch.compiler.disable
    def reset(self) -> None:
        """Forget all copies, as after an interrupt."""
        if self.stream:
            torch.cuda.synchronize(self.device)
        for parcel, *_ in self.queue:
            parcel.leave()
        self.queue.clear()
        self.used.clear()
        self.position, self.last, self.done, self.clean = 0, None, None, True

    def copy(self, parcel: Parcel) -> bool:
        """Start to copy a parcel behind the last one; False if there is no room yet."""
        start = self.position  # it counts on, lap after lap
        if start % self.size + parcel.bytes > self.size:
            start += self.size - start % self.size  # no parcel lies across the end
        overwritten = start + parcel.bytes - self.size
        if self.queue and self.queue[0][1] < overwritten:
            return False
        parcel.pack()
        with torch.cuda.stream(self.stream):  # which does nothing without a stream
            while self.used and self.used[0][0] < overwritten:
                self.stream.wait_event(self.used.popleft()[1])
            self.memory[start % self.size :][: parcel.bytes].copy_(parcel.host, non_blocking=True)
            self.queue.append((parcel, start, self.stream and self.stream.record_event()))
        self.position = start + parcel.bytes
        return True

    @torch.compiler.disable
    def take(self, parcel: Parcel) -> None:
        """Let the model use a parcel; the computation waits until it is copied, Python does not."""
        self.clean = False
        if self.memory is None:
            self.memory = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                self.memory.record_stream(self.stream)
        while self.queue and self.queue[0][0] is not parcel:
            self.queue.popleft()  # expected, and not asked for
        if not self.queue:
            self.copy(parcel)
        self.following[self.last], self.last = parcel, parcel
        self.run_ahead()
        _, start, copied = self.queue[0]
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
        parcel.point(parcel.views(self.memory, start % self.size))

    @torch.compiler.disable
    def give_back(self, parcel: Parcel) -> None:
        """The computation with a parcel is under way: its room may be filled as soon as that ends."""
        if self.stream:
            self.done = torch.cuda.current_stream(self.device).record_event()
            self.used.append((self.queue[0][1], self.done))
        self.queue.popleft()
        parcel.leave()
        self.run_ahead()
        self.clean = True

    @torch.compiler.disable
    def receive(self, guests: list[Parcel]) -> None:
        """Let these parcels come to the card and stay until others are received: those of the last time leave."""
        measuring = self.peaks is not None
        if measuring:
            self.note_peak()
        for parcel in self.guests:
            parcel.leave()
        if self.stream and (measuring or ((self.guests or guests) and not EXPANDABLE)):
            torch.cuda.empty_cache()  # what is cached in pieces would not be used again
        if measuring:  # from here on, without those that left
            torch.cuda.reset_peak_memory_stats(self.device)
        self.guests, start = guests, 0
        memory = torch.empty(sum(parcel.bytes for parcel in guests), dtype=torch.uint8, device=self.device)
        for parcel in guests:
            parcel.visit(memory, start)
            start += parcel.bytes

    def note_peak(self) -> None:
        """Note what was reserved at most while the parcels of the last `receive` were there."""
        peak = torch.cuda.max_memory_reserved(self.device)
        self.peaks[id(self.guests)] = max(peak, self.peaks.get(id(self.guests), 0))

    def run_ahead(self) -> None:
        """Copy what is expected next, as long as there is room."""
        ahead = self.following.get(self.queue[-1][0] if self.queue else self.last)
        while ahead and not ahead.here and all(ahead is not parcel for parcel, *_ in self.queue):
            if not self.copy(ahead):
                return
            ahead = self.following.get(ahead)


class StreamedBlock:
    """What a streamed block does more. It surrounds the call, whatever compiles or wraps `forward`, before or after."""

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ring, parcel = self._streamed.ring, self._parcel
        if parcel.here:
            return super().__call__(*args, **kwargs)
        try:
            ring.take(parcel)
            output = super().__call__(*args, **kwargs)
            ring.give_back(parcel)
            return output
        except BaseException:  # Ctrl-C included
            ring.reset()
            raise


@functools.cache
def streamed_class(base: type) -> type:
    """`StreamedBlock` before the class of a block, under the same name: torch's `fully_shard` does it in this way.

    Blocks of a kind share the class, and with it their compiled code.
    """
    TransformerBlockRegistry._register()
    new = type(base.__name__, (StreamedBlock, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
    if base in TransformerBlockRegistry._registry:  # where caches such as FirstBlockCache look
        TransformerBlockRegistry._registry[new] = TransformerBlockRegistry._registry[base]
    return new


class Streamed:
    """A model whose blocks come to the card when they are needed. `remove` makes it a plain model again."""

    def __init__(self, model: torch.nn.Module, ring: Ring, whole: bool = False) -> None:
        self.model, self.ring, self.device, self.whole = model, ring, ring.device, whole
        if hasattr(model, "_streamed") or is_offloaded(model):
            raise ValueError(f"This {type(model).__name__} is offloaded already: end that, or load it anew.")
        blocks = {block: tensors_of(block) for block in ([] if whole else find_blocks(model))}
        everything = tensors_of(model)
        moving = sum(tensor.nbytes for tensor in everything if tensor.device.type != "cpu")
        if moving > psutil.virtual_memory().available:
            raise MemoryError(f"{size(moving)} of weights are to move to host memory, where less is free.")
        uses = Counter(id(tensor) for tensors in blocks.values() for tensor in tensors)
        largest = max((sum(tensor.nbytes for tensor in tensors) for tensors in blocks.values()), default=0)
        buffers = {id(tensor): tensor for tensor in model.buffers()}  # a pipeline may use those of a VAE without a call
        first = next(model.parameters(), None)  # diffusers takes its device for that of the model
        if whole and first is not None:
            buffers[id(first)] = first
        outside = {
            id(first),
            *buffers,
            *(id(tensor) for tensor in everything if tensor.nbytes < largest / 1000),  # to point to it takes longer
            *(key for key, count in uses.items() if count > 1),
        }
        blocks = {block: [t for t in tensors if id(t) not in outside] for block, tensors in blocks.items()}
        blocks = {block: tensors for block, tensors in blocks.items() if tensors}
        elsewhere = {*buffers, *(id(tensor) for tensors in blocks.values() for tensor in tensors)}
        # First what every file of weights has some of: a file stays in memory until its last tensor is copied.
        self.rest = Parcel([tensor for tensor in everything if id(tensor) not in elsewhere], self.device)
        self.buffers = Parcel(list(buffers.values()), self.device)
        for block, tensors in blocks.items():
            block._parcel = Parcel(tensors, self.device)
            block._streamed, block.__class__ = self, streamed_class(type(block))
        self.parcels = [block._parcel for block in blocks]
        ring.following |= zip(self.parcels, self.parcels[1:] + self.parcels[:1], strict=True)  # a first guess
        self.buffers.stay()
        self.guests = [self.rest]  # what is on the card while this runs, or other models with the same list
        model._streamed, model._apply = self, self.apply
        inside = {module for block in blocks for module in block.modules()}
        entries = [module for module in model.modules() if module not in inside]  # a VAE is entered by its decoder
        self.hooks = [module.register_forward_pre_hook(self.begin, with_kwargs=True) for module in entries]

    def __reduce__(self) -> Any:
        raise TypeError("A streamed model cannot be copied or pickled: end that first with `remove()`.")

    @torch.compiler.disable
    def begin(self, module: torch.nn.Module, *arguments: Any) -> Any:
        """Before a forward outside the blocks: bring what is outside to the card. Returns the arguments, there too."""
        ring = self.ring
        if module is not self.model and ring.guests is self.guests:
            return None
        if not ring.clean:
            ring.reset()
        if ring.done is None or ring.done.query():  # idle, as between two calls: others may have changed the model
            ring.queue.clear()
            if is_offloaded(self.model):
                raise RuntimeError(
                    "Offloading was enabled for a streamed model: load it anew, and choose one of the two."
                )
            parcels = (*self.parcels, self.rest, self.buffers)
            known = {id(tensor) for parcel in parcels for tensor in parcel.tensors}
            for tensor in tensors_of(self.model):
                if id(tensor) not in known:
                    tensor.data = tensor.data.to(self.device)  # a LoRA is small, and stays
        if ring.guests is not self.guests:
            ring.receive(self.guests)
        if all(leaf.device == self.device for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)):
            return None  # the very same arguments: a VAE writes into the list that it is given as a cache
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), arguments)

    def apply(self, function: Callable, recurse: bool = True) -> torch.nn.Module:
        """In place of the `_apply` of the model: `.to` another device ends the streaming.

        After `.to` another dtype it begins again with all that can move, unless all of it stays on the card: pipelines
        in float16 upcast their VAE so.
        """
        moves, changes = False, False
        for dtype, dim in {(t.dtype, t.dim()) for t in (*self.model.parameters(), *self.model.buffers())}:
            for place in (self.device, HOST):
                probe = torch.empty((2,) * dim, dtype=dtype, device=place)
                result = function(probe)
                moves |= result.device != place
                changes |= (result.dtype, result.stride()) != (dtype, probe.stride())
        stays = all(parcel.host is None for parcel in (*self.parcels, self.rest))
        if not moves and stays and next(self.model.buffers(), None) is None:  # `_apply` would replace those
            return type(self.model)._apply(self.model, function, recurse)
        if moves or changes:
            self.remove()
            self.model._apply(function, recurse)
            if not moves:
                self.__init__(self.model, self.ring, self.whole)
                self.ring.size = max([self.ring.size, *(parcel.bytes for parcel in self.parcels)])
        return self.model

    def keep(self, budget: float, as_guests: bool = False) -> int:
        """Let blocks stay on the card, for at most `budget` bytes: the largest first, evenly spread over their kind.

        They have most to copy for their compute. Guests leave when another model runs. Returns the bytes that were
        taken.
        """
        streamed = [parcel for parcel in self.parcels if parcel.host is not None and parcel not in self.guests]
        taken = 0
        for size in sorted({parcel.bytes for parcel in streamed}, reverse=True):
            kind = [parcel for parcel in streamed if parcel.bytes == size]
            count = min(len(kind), int((budget - taken) // size))
            chosen = [kind[number * len(kind) // count] for number in range(count)]
            if as_guests:
                self.guests += chosen
            else:
                for parcel in chosen:
                    parcel.stay()
            taken += count * size
        return taken

    def remove(self) -> None:
        """End it: all weights go back to where they were."""
        self.ring.reset()
        self.ring.following.clear()
        for parcel in self.ring.guests:
            parcel.leave()
        self.ring.memory, self.ring.guests = None, []
        own = {id(parcel) for parcel in (*self.parcels, self.rest)}
        self.guests[:] = [parcel for parcel in self.guests if id(parcel) not in own]
        for parcel in (*self.parcels, self.rest, self.buffers):
            parcel.restore()
        for hook in self.hooks:
            hook.remove()
        for module in self.model.modules():
            if isinstance(module, StreamedBlock):
                module.__class__ = type(module).__mro__[2]
                del module._streamed, module._parcel
        del self.model._streamed, self.model._apply


def stream_blocks(model: torch.nn.Module, budget_gb: float, device: torch.device | str | None = None) -> Streamed:
    """Let the repeated blocks of a model take `budget_gb` of the card; the rest of the model stays there.

    A small part of the budget is the ring. What is left are blocks that stay.

    Raises:
        ValueError: no repeated blocks, a budget below the largest block, or a model that is offloaded already.
        MemoryError: too little host memory.
    """
    if not find_blocks(model):
        raise ValueError(f"A {type(model).__name__} has no repeated blocks to stream.")
    streamed, budget = Streamed(model, Ring(device)), budget_gb * GB
    sizes = [parcel.bytes for parcel in streamed.parcels]
    if budget < max(sizes):
        streamed.remove()
        raise ValueError(f"The largest block takes {size(max(sizes))}: give at least that, and better twice that.")
    streamed.rest.stay()
    streamed.guests.clear()
    streamed.ring.size = 0 if budget >= sum(sizes) else int(min(budget, RING * max(sizes))) // 256 * 256
    streamed.keep(budget - streamed.ring.size)
    return streamed


class Filled:
    """A pipeline within a limit. `print` it to read what was decided and why; `remove` makes it a plain pipeline.

    `least_gb` is what a call would reserve with every block streamed, `expected_gb` what it will reserve.
    """

    def __init__(self) -> None:
        self.parts, self.reasons, self.tiled_vae, self.least_gb, self.expected_gb = {}, [], None, 0.0, 0.0

    def __str__(self) -> str:
        return "\n".join(self.reasons)

    def remove(self) -> None:
        """End it: all weights go back to where they were."""
        for streamed in self.parts.values():
            if hasattr(streamed.model, "_streamed"):
                streamed.remove()
        if self.tiled_vae:
            self.tiled_vae.disable_tiling()


def fill_card(
    pipeline: DiffusionPipeline, limit_gb: float | None = None, device: torch.device | str | None = None, **call: Any
) -> Filled:
    """Fit a pipeline into `limit_gb` of reserved memory (without a limit: what is free now), as fast as it allows.

    `call` has the arguments of the calls to come, the size above all: one step of it measures what a call takes with
    every block streamed. What the limit leaves goes to blocks that stay. On a CPU only weights are counted.

    Raises:
        ValueError: a component is offloaded already, or cannot be streamed.
        MemoryError: the limit is too low for this call, or the host has too little memory.
    """
    models = {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}
    models = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    for model in models.values():
        if hasattr(model, "_streamed"):
            model._streamed.remove()
    ring, filled = Ring(device), Filled()
    try:
        for name, model in models.items():
            # A VAE comes and goes whole: with tiles it would need its blocks many times.
            filled.parts[name] = Streamed(model, ring, whole=hasattr(model, "decode"))
        _plan(pipeline, filled, ring, limit_gb, call)
    except torch.OutOfMemoryError as error:
        filled.remove()
        raise MemoryError("The card has no room even for what is outside of the blocks: give more.") from error
    except BaseException:
        filled.remove()
        raise
    return filled


def try_out(pipeline: DiffusionPipeline, call: dict[str, Any]) -> None:
    """Call with as few steps as the pipeline can do: one, unless a low `strength` or its scheduler need more."""
    short = {key: value for key, value in call.items() if key not in ("generator", "sigmas", "timesteps")}
    for steps in (1, 4):
        try:
            pipeline(**short | {"num_inference_steps": steps})
            return
        except torch.OutOfMemoryError:
            raise
        except Exception:
            continue  # what is wrong with the call itself, the whole call says
    pipeline(**call)


def _plan(pipeline: DiffusionPipeline, filled: Filled, ring: Ring, limit_gb: float | None, call: dict) -> None:
    """Decide what stays, comes and goes, or is streamed."""
    parts, on_gpu = filled.parts, ring.device.type == "cuda"
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved(ring.device) if on_gpu else 0
    free = torch.cuda.mem_get_info(ring.device)[0] if on_gpu else psutil.virtual_memory().available
    limit = free if limit_gb is None else limit_gb * GB
    # What runs at each step. The others run once: text encoders before the steps, the VAE after them.
    steps = [name for name, s in parts.items() if isinstance(s.model, ModelMixin) and not hasattr(s.model, "decode")]
    others, together = [name for name in parts if name not in steps], []
    for name in steps:
        parts[name].guests = together
    held = sum(parts[name].rest.stay() for name in steps)
    ring.size = RING * max((parcel.bytes for s in parts.values() for parcel in s.parcels), default=0)

    def measure() -> tuple[float, float]:
        """Bytes that a call reserves with every block streamed: during the steps, and before and after them."""
        if not on_gpu:
            return held + ring.size, held + ring.size + max((parts[name].rest.bytes for name in others), default=0)
        ring.peaks = {}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ring.device)
        try:
            with torch.random.fork_rng([ring.device]):
                try_out(pipeline, call)
        except torch.OutOfMemoryError:
            return float("inf"), float("inf")
        ring.note_peak()
        in_steps, outside = ring.peaks.pop(id(together), 0), max(ring.peaks.values(), default=0)
        return SPARE * (in_steps - reserved), SPARE * (outside - reserved)

    (in_steps, outside), vae, tiling = measure(), getattr(pipeline, "vae", None), "in one piece"
    if outside > limit and not getattr(vae, "use_tiling", True):
        tiling = "in tiles, because the limit is too low for the whole picture"
        filled.tiled_vae = vae
        vae.enable_tiling()
        in_steps, outside = measure()
    ring.peaks, peak = None, max(in_steps, outside)
    if peak > limit:
        takes = "more than is free" if peak == float("inf") else size(peak)
        raise MemoryError(
            f"With every block streamed a call takes {takes}, and the limit is {size(limit)}: draw smaller, or give "
            "more."
        )
    # What stays takes from both; blocks of the steps that leave for the others take from the room of the steps alone.
    step_room, room = limit - in_steps, limit - outside
    total = sum(parcel.bytes for name in steps for parcel in parts[name].parcels) or 1
    shares = {name: sum(parcel.bytes for parcel in parts[name].parcels) / total for name in steps}
    stays = sum(parts[name].keep(min(step_room, room) * share) for name, share in shares.items())
    step_room, room = step_room - stays, room - stays
    step_room -= sum(parts[name].keep(step_room * share, as_guests=True) for name, share in shares.items())
    room = min(step_room, room)
    for name in others:
        room -= parts[name].keep(room)
    for name, s in parts.items():
        if s.rest.host is not None and s.rest.bytes <= room and all(parcel.here for parcel in s.parcels):
            s.guests.clear()
            room -= s.rest.stay()
        guests = [parcel for parcel in s.parcels if parcel in together]
        moving = [parcel for parcel in s.parcels if parcel.host is not None and parcel not in together]
        how = "stays on the card" if s.rest.host is None else "comes when it is called, and leaves for the next"
        for parcels, what in ((guests, "stay for the steps only"), (moving, "are streamed")):
            if parcels:
                how += f"; {len(parcels)} of its {len(s.parcels)} blocks {what} ({size(sum(p.bytes for p in parcels))})"
        how += f"; it decodes {tiling}" if s.model is vae else ""
        filled.reasons.append(f"{name} ({size(sum(parcel.bytes for parcel in (*s.parcels, s.rest)))}) {how}.")
    filled.least_gb, filled.expected_gb = peak / GB, (limit - room) / GB
    filled.reasons.append(
        f"Expected: {size(limit - room)} of {size(limit)}. With every block streamed a call takes {size(peak)}, "
        f"{size(held + ring.size)} of it weights that are always there."
    )


def size(count: float) -> str:
    """Bytes in GB, or in MB if they are few."""
    return f"{count / GB:.2f} GB" if count >= 0.1 * GB else f"{count / 1e6:.2f} MB"

"""How a pipeline starts, where its components are, and how it is compiled: the combinations that are measured.

Each strategy is one small function, made of the calls that the lessons teach. A combination such as
"saved nf4, model offload, regional compile" is one start, one placement and one compilation. The three recipes are
those of the diffusers guide https://huggingface.co/docs/diffusers/optimization/speed-memory-optims, as it has them.
"""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook, apply_group_offloading
from diffusers.hooks.first_block_cache import FBCBlockHook
from diffusers.hooks.group_offloading import ModuleGroup
from transformers import TorchAoConfig as TorchAoConfigOfEncoders

from helpers import cpu_backend, devices
from helpers.errors import TutorialError
from helpers.models import Model, find_file_size
from helpers.residency import is_model_offloaded
from helpers.streaming import fill_card, find_blocks

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
CPU = torch.device("cpu")
NUMBER = r"(\d+|\d*\.\d+)"
LIMIT = f"{NUMBER} GB"
CACHED = re.compile(f"(.+), first block cache {NUMBER}")
WEIGHTS = {"nf4": "nf4", "saved nf4": "nf4", "fp8": "float8_e4m3fn"}  # of a start, by the words of `footprint`


# How the weights come


def load_bf16(model: Model) -> DiffusionPipeline:
    """All components in bfloat16, in host memory."""
    return DiffusionPipeline.from_pretrained(model.path, variant=model.variant, dtype=torch.bfloat16)


def quantize_at_load(model: Model) -> DiffusionPipeline:
    """nf4 for the denoisers and the large text encoders, quantized while they load, on the accelerator."""
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=NF4, components_to_quantize=list(model.quantized)
    )
    return DiffusionPipeline.from_pretrained(
        model.path, variant=model.variant, quantization_config=config, dtype=torch.bfloat16
    )


def load_saved_nf4(model: Model) -> DiffusionPipeline:
    """The nf4 weights that `save_nf4` wrote, loaded into host memory: nothing touches the accelerator."""
    parts = {
        name: model.component_class(name).from_pretrained(
            model.saved, subfolder=name, dtype=torch.bfloat16, device_map="cpu"
        )
        for name in model.quantized
    }
    # By its own class: DiffusionPipeline drops a component that the class calls optional, such as Wan's transformer,
    # and loads another one from the folder (diffusers 0.42).
    return model.pipeline_class.from_pretrained(model.saved, dtype=torch.bfloat16, **parts)


def quantize_to_fp8(model: Model) -> DiffusionPipeline:
    """float8 for what `quantize_at_load` makes nf4, by torchao: weights once, activations anew in each product.

    Each row of a weight, and each token, has a scale of its own. A layer with a dimension that is no multiple of 16
    stays. torchao sets the compiler to search longer for fast kernels (`set_inductor_config`), as its users have it.

    Raises:
        TutorialError: torchao is missing, or the accelerator has no products of float8.
    """
    check_fp8()
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    kinds = {name: TorchAoConfig if name in model.denoisers else TorchAoConfigOfEncoders for name in model.quantized}
    fp8 = {name: kind(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())) for name, kind in kinds.items()}
    return DiffusionPipeline.from_pretrained(
        model.path,
        variant=model.variant,
        quantization_config=PipelineQuantizationConfig(quant_mapping=fp8),
        dtype=torch.bfloat16,
    )


def check_fp8() -> None:
    """Whether float8 can be measured here. It is an extra: nothing else needs torchao.

    Raises:
        TutorialError: it cannot.
    """
    if importlib.util.find_spec("torchao") is None:
        raise TutorialError('fp8 needs torchao: run `python -m pip install "torchao>=0.18,<1"`, or measure nf4.')
    device = devices.accelerator()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 9):
        raise TutorialError(
            "fp8 needs a card of compute capability 8.9 or higher, such as an RTX 40 or an H100, and this is "
            f"{devices.device_name()}: measure nf4."
        )


def save_nf4(model: dict, folder: str) -> None:
    """Quantize once and write the result to `folder`, for `load_saved_nf4`. `model` is a `Model` as a dictionary."""
    cpu_backend.enable()
    pipeline = quantize_at_load(Model(**model))
    size = find_file_size(*devices.component_modules(pipeline).values())
    pipeline.save_pretrained(folder, max_shard_size=size)


# Where the components are


def put_resident(pipeline: DiffusionPipeline, model: Model) -> None:
    """Everything on the accelerator."""
    pipeline.to(devices.accelerator())


def offload_models(pipeline: DiffusionPipeline, model: Model) -> None:
    """One component on the accelerator at a time."""
    pipeline.enable_model_cpu_offload(device=devices.accelerator())


def offload_text_encoders(pipeline: DiffusionPipeline, model: Model) -> None:
    """The text encoders layer by layer; everything else on the accelerator."""
    for encoder in _modules(pipeline, model.text_encoders):
        _group_offload(encoder, offload_type="leaf_level", **_stream())
    _move_rest(pipeline, model.text_encoders)


def offload_leaves(pipeline: DiffusionPipeline, model: Model, record_stream: bool = False) -> None:
    """Denoisers, VAE and text encoders layer by layer, the next one copied while one computes. As in recipe 3."""
    for denoiser in _modules(pipeline, model.denoisers):
        _group_offload(denoiser, offload_type="leaf_level", **_stream(record_stream))
    _offload_all_but_denoisers(pipeline, model)


def offload_blocks(
    pipeline: DiffusionPipeline, model: Model, record_stream: bool = True, rest_stays: bool = False
) -> None:
    """The denoisers block by block; VAE and text encoders layer by layer.

    `rest_stays` leaves what a denoiser has outside its blocks on the accelerator.
    """
    for denoiser in _modules(pipeline, model.denoisers):
        keep_unquantized_outside_blocks(denoiser)
        _group_offload(denoiser, offload_type="block_level", num_blocks_per_group=1, **_stream(record_stream))
        if rest_stays:
            keep_rest_on_card(denoiser)
    _offload_all_but_denoisers(pipeline, model)


def stream(pipeline: DiffusionPipeline, model: Model, limit_gb: float, **call: Any) -> None:
    """As much on the accelerator as `limit_gb` has room for; the other blocks are streamed. `call` is that to come.

    From here on PyTorch reserves no more than that: what does not fit a card of this size must not fit a larger one.

    Raises:
        TutorialError: the limit is too low for the call, or the host has too little memory.
    """
    devices.limit_memory(limit_gb)
    try:
        fill_card(pipeline, limit_gb, **call)
    except (MemoryError, ValueError) as error:
        raise TutorialError(str(error)) from error


def _offload_all_but_denoisers(pipeline: DiffusionPipeline, model: Model) -> None:
    """VAE and text encoders layer by layer; what is left, if anything, on the accelerator."""
    rest = (*model.text_encoders, *model.vaes)
    for module in _modules(pipeline, rest):
        _group_offload(module, offload_type="leaf_level", **_stream())
    _move_rest(pipeline, (*model.denoisers, *rest))


def _modules(pipeline: DiffusionPipeline, names: tuple[str, ...]) -> list[torch.nn.Module]:
    """The components of these names that the pipeline has: one for precomputed embeddings has no text encoders."""
    return [module for name, module in devices.component_modules(pipeline).items() if name in names]


def _stream(record_stream: bool = False) -> dict:
    """Copies in a stream of their own, where there is an accelerator: a CPU has no streams."""
    device = devices.accelerator()
    has_stream = device.type != "cpu"
    stream = {"use_stream": has_stream, "non_blocking": has_stream, "record_stream": has_stream and record_stream}
    return {"onload_device": device, "offload_device": CPU, **stream}


def _group_offload(module: torch.nn.Module, **settings) -> None:
    """By diffusers' own method where the component has one: it knows which modules of a VAE belong together."""
    put_quant_states(module, devices.accelerator())
    if hasattr(module, "enable_group_offload"):
        module.enable_group_offload(**settings)
    else:
        apply_group_offloading(module, **settings)


def put_quant_states(module: torch.nn.Module, device: torch.device) -> None:
    """Move the quant_state of each nf4 weight to `device`, where it stays: group offload moves the weight alone.

    Weights that were quantized at load have it there already. Those loaded on the CPU have not: the first product would
    read an address that is not the card's.
    """
    for layer in module.modules():
        if isinstance(layer, Linear4bit) and layer.weight.quant_state is not None:
            layer.weight.quant_state.to(device)


def keep_unquantized_outside_blocks(denoiser: torch.nn.Module) -> None:
    """Turn the few nf4 layers outside the lists of blocks (embedders, last projection) back into bfloat16 ones.

    Block-level group offload moves these without a stream, by `module.to("cpu")`, which takes the quant_state along,
    and brings back the weight alone. Naming them in `llm_int8_skip_modules` would do too, but a name such as proj_out
    also means the layers of that name in FLUX's blocks: 2.6 GB more. So the configuration stays as it is, and what
    `save_pretrained` writes of these layers is nf4, as it was loaded: the same weights.
    """
    for name, layer in list(denoiser.named_modules()):
        parent = denoiser.get_submodule(name.split(".")[0])
        if isinstance(layer, Linear4bit) and not isinstance(parent, (torch.nn.ModuleList, torch.nn.Sequential)):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
            plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
            plain.register_state_dict_post_hook(partial(_save_as_nf4, layer.weight.to("cpu")))
            denoiser.set_submodule(name, plain)


def _save_as_nf4(packed: Params4bit, plain: torch.nn.Linear, state_dict: dict, prefix: str, metadata: dict) -> None:
    """Put the nf4 weight that a layer was made from in place of its bfloat16 one."""
    if not torch.equal(dequantize_4bit(packed.data, packed.quant_state).to(plain.weight), plain.weight):
        # It was changed since, for instance by a fused LoRA.
        nested, kind = packed.quant_state.nested, packed.quant_state.quant_type
        changed = plain.weight.detach().to("cpu").contiguous()
        packed = Params4bit(changed, requires_grad=False, compress_statistics=nested, quant_type=kind).to("cpu")
    state_dict[f"{prefix}weight"] = packed.data
    for key, value in packed.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}weight.{key}"] = value


def keep_rest_on_card(denoiser: torch.nn.Module) -> None:
    """Bring what block-level group offload moves outside the blocks to the accelerator, and let it stay there.

    diffusers has no setting for it: the group of these layers has no stream and comes before each forward. It is a list
    of modules, which is emptied here, and again whenever diffusers makes it anew, as `load_lora_weights` does. The
    layers must be unquantized.
    """
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    register = registry.register_hook

    def register_and_empty(hook: ModelHook, name: str) -> None:
        register(hook, name)
        if name == "group_offloading":
            empty(hook.group)

    def empty(group: ModuleGroup) -> None:
        group.onload_()
        group.modules, group.parameters, group.buffers = [], [], []

    empty(registry.get_hook("group_offloading").group)
    registry.register_hook = register_and_empty


def _move_rest(pipeline: DiffusionPipeline, offloaded: tuple[str, ...]) -> None:
    for name, module in devices.component_modules(pipeline).items():
        if name not in offloaded:
            module.to(devices.accelerator())


# How the denoiser is compiled


def run_eagerly(pipeline: DiffusionPipeline, model: Model) -> None:
    """Not at all."""


def compile_whole(pipeline: DiffusionPipeline, model: Model) -> None:
    """Each denoiser as one graph; hooks of an offloading technique break it."""
    torch._dynamo.config.cache_size_limit = 1000
    for denoiser in _modules(pipeline, model.denoisers):
        denoiser.compile()


def compile_blocks(pipeline: DiffusionPipeline, model: Model) -> None:
    """The repeated blocks of each denoiser: one graph for all blocks of a kind."""
    torch._dynamo.config.cache_size_limit = 1000
    for denoiser in _modules(pipeline, model.denoisers):
        denoiser._repeated_blocks = _repeated_blocks(denoiser)
        denoiser.compile_repeated_blocks(fullgraph=True)


def compile_inside(pipeline: DiffusionPipeline, model: Model) -> None:
    """The forward of each repeated block, before an offloading hook wraps it: the hooks stay out of the graph."""
    torch._dynamo.config.cache_size_limit = 1000
    for denoiser in _modules(pipeline, model.denoisers):
        blocks = _repeated_blocks(denoiser)
        for module in denoiser.modules():
            if type(module).__name__ in blocks:
                module.forward = torch.compile(module.forward, fullgraph=True)


def _repeated_blocks(denoiser: torch.nn.Module) -> list[str]:
    """Classes of the repeated blocks; where diffusers does not name them, those in the denoiser's own lists.

    `helpers.streaming.find_blocks` would add what `_no_split_modules` names: of PixArt PatchEmbed, which is there once.
    """
    lists = [child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList)]
    blocks = denoiser._repeated_blocks or sorted({type(block).__name__ for blocks in lists for block in blocks})
    if not blocks:
        raise TutorialError(f"A {type(denoiser).__name__} has no repeated blocks to compile.")
    return list(blocks)


# Whether blocks are skipped


def cache_first_block(pipeline: DiffusionPipeline, model: Model, threshold: float) -> None:
    """Skip all blocks but the first where that has changed by less than `threshold`: a share of what it adds.

    How often that happens depends on the weights: a step that is skipped with random ones says nothing of trained ones.
    What a step takes does not. So at full size measure a threshold of 0, with which every step is computed, and one of
    1000, with which every step but the first is skipped, and weight the two `step_ms` by the share that trained weights
    skip. `skipped` of the measurement says what happened.

    Raises:
        TutorialError: diffusers has no such cache for a denoiser.
    """
    for denoiser in _modules(pipeline, model.denoisers):
        try:
            denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        except (AttributeError, IndexError, ValueError):
            name = type(denoiser).__name__
            raise TutorialError(f"diffusers has no first block cache for a {name}: leave the cache out.") from None
        _mend_cache(denoiser)


class _JoinedTail(FBCBlockHook):
    """The last block of FLUX.2, which returns text and picture in one tensor, where the first one returns two.

    diffusers 0.42 takes them from each other: `TypeError` (https://github.com/huggingface/diffusers/issues/14280).
    """

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Join what the first block returned, and part what is to be added when blocks are skipped."""
        state = self.state_manager.get_state()
        if not state.should_compute:
            return super().new_forward(module, *args, **kwargs)
        picture, text = state.head_block_output
        state.head_block_output = torch.cat([text, picture], dim=1)
        output = super().new_forward(module, *args, **kwargs)
        residual, _ = state.tail_block_residuals
        state.tail_block_residuals = residual[:, text.shape[1] :], residual[:, : text.shape[1]]
        return output


def _mend_cache(denoiser: torch.nn.Module) -> None:
    registries = [part._diffusers_hook for part in denoiser.modules() if hasattr(part, "_diffusers_hook")]
    (first,) = filter(None, (registry.get_hook("fbc_leader_block_hook") for registry in registries))
    for registry in registries:
        last = registry.get_hook("fbc_block_hook")
        if last is not None and last.is_tail:
            returns = [hook._metadata.return_encoder_hidden_states_index for hook in (first, last)]
            if returns[0] is not None and returns[1] is None:
                registry.remove_hook("fbc_block_hook", recurse=False)
                registry.register_hook(_JoinedTail(last.state_manager, is_tail=True), "fbc_block_hook")


# The recipes of the guide


def recipe_1(model: Model) -> DiffusionPipeline:
    """Quantize and compile. The guide's channels_last is for pictures; a video's convolutions have one of their own."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    pipeline = quantize_at_load(model).to(devices.accelerator())
    for denoiser in _modules(pipeline, model.denoisers):
        is_video = any(weight.dim() == 5 for weight in denoiser.parameters())
        denoiser.to(memory_format=torch.channels_last_3d if is_video else torch.channels_last)
        denoiser.compile(mode="max-autotune", fullgraph=True)
    return pipeline


def recipe_2(model: Model) -> DiffusionPipeline:
    """Quantize, model offload, compile."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    pipeline = quantize_at_load(model)
    offload_models(pipeline, model)
    compile_whole(pipeline, model)
    return pipeline


def recipe_3(model: Model) -> DiffusionPipeline:
    """Quantize, leaf-level group offload with a stream, compile."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    pipeline = quantize_at_load(model)
    offload_leaves(pipeline, model)
    compile_whole(pipeline, model)
    return pipeline


STARTS = {"bf16": load_bf16, "nf4": quantize_at_load, "saved nf4": load_saved_nf4, "fp8": quantize_to_fp8}
PLACEMENTS = {
    "resident": put_resident,
    "model offload": offload_models,
    "text encoders offloaded": offload_text_encoders,
    "leaf group offload": offload_leaves,
    "block group offload": offload_blocks,
    "leaf group offload with record_stream": partial(offload_leaves, record_stream=True),
    "block group offload without record_stream": partial(offload_blocks, record_stream=False),
    "block group offload with the rest on the card": partial(offload_blocks, rest_stays=True),
    **{f"streamed, {limit} GB": partial(stream, limit_gb=limit) for limit in (4, 8, 12)},  # or any other limit
}
COMPILATIONS = {
    "eager": run_eagerly,
    "full compile": compile_whole,
    "regional compile": compile_blocks,
    "compiled inside": compile_inside,
}
RECIPES = {"recipe 1": recipe_1, "recipe 2": recipe_2, "recipe 3": recipe_3}
RECIPE_PLACEMENTS = {"recipe 1": "resident", "recipe 2": "model offload", "recipe 3": "leaf group offload"}

COMBINATIONS = (
    "bf16, resident, eager",  # first: the picture that the others are compared with
    "bf16, resident, full compile",
    "bf16, resident, regional compile",
    "bf16, model offload, regional compile",
    "nf4, resident, eager",
    "nf4, resident, full compile",
    "nf4, resident, regional compile",
    "nf4, model offload, eager",
    "nf4, model offload, regional compile",
    "saved nf4, resident, regional compile",
    "saved nf4, text encoders offloaded, regional compile",
    "saved nf4, model offload, regional compile",
    "saved nf4, leaf group offload, eager",
    "saved nf4, block group offload, eager",
    "saved nf4, block group offload, compiled inside",
    "saved nf4, streamed, 4 GB, regional compile",
    "saved nf4, streamed, 8 GB, regional compile",
    "saved nf4, streamed, 12 GB, regional compile",
    "recipe 1",
    "recipe 2",
    "recipe 3",
)
# Settings of group offload, measured when they are asked for by name, as other combinations are.
VARIANTS = (
    "saved nf4, leaf group offload with record_stream, eager",
    "saved nf4, block group offload without record_stream, compiled inside",
    "saved nf4, block group offload with the rest on the card, compiled inside",
)
# Other ways to the same end, which have needs of their own: measured when they are asked for by their whole name.
PEERS = (
    "fp8, resident, eager",
    "fp8, resident, regional compile",
    "fp8, model offload, regional compile",
    "saved nf4, resident, compiled inside",
    *(f"saved nf4, resident, compiled inside, first block cache {threshold}" for threshold in (0, 0.1, 1000)),
    "saved nf4, streamed, 8 GB, compiled inside",
    *(f"saved nf4, streamed, 8 GB, compiled inside, first block cache {threshold}" for threshold in (0, 0.1, 1000)),
)


def is_streamed(name: str) -> bool:
    """Whether this names a streamed combination, of whichever limit."""
    name, _ = split_cache(name)
    return re.fullmatch(rf"({'|'.join(STARTS)}), streamed, {LIMIT}, ({'|'.join(COMPILATIONS)})", name) is not None


def is_combination(name: str) -> bool:
    """Whether this names a start, a placement and a compilation, of which any three make a combination.

    A cache may be named behind them.
    """
    name, _ = split_cache(name)
    start, _, rest = name.partition(", ")
    placement, _, compilation = rest.rpartition(", ")
    return (start in STARTS and placement in PLACEMENTS and compilation in COMPILATIONS) or is_streamed(name)


def split_cache(name: str) -> tuple[str, float | None]:
    """The name of a combination without its cache, and the threshold of that; None if it has none."""
    cached = CACHED.fullmatch(name)
    return (cached[1], float(cached[2])) if cached else (name, None)


def find_placement(placement: str, call: dict[str, Any]) -> Callable[[DiffusionPipeline, Model], None]:
    """The function that puts a pipeline in its place, before it is called with `call`."""
    if streamed := re.fullmatch(f"streamed, {LIMIT}", placement):
        return partial(stream, limit_gb=float(streamed[1]), **call)
    return PLACEMENTS[placement]


def assemble(name: str, model: dict, call: dict[str, Any] | None = None) -> DiffusionPipeline:
    """The pipeline of a combination, ready to be called. `model` is a `Model` as a dictionary.

    `call` are the arguments of the calls to come: what is streamed depends on the size.
    """
    subject = Model(**model)
    if name in RECIPES:
        pipeline = RECIPES[name](subject)
        check(pipeline, subject, name, "nf4", RECIPE_PLACEMENTS[name])
        return pipeline
    combination, threshold = split_cache(name)
    start, *words, compilation = combination.split(", ")
    placement = ", ".join(words)
    if threshold is not None and compilation == "regional compile":
        raise TutorialError(
            "A cache decides in Python, which no whole graph of a block can hold: name compiled inside, or eager."
        )
    pipeline = STARTS[start](subject)
    place, compile_ = find_placement(placement, call or {}), COMPILATIONS[compilation]
    # Compiled after the offloading is enabled, except where the point is to compile inside of the hooks, and before
    # the streaming, which measures what the compiled blocks need.
    steps = [compile_, place] if compilation == "compiled inside" or words[0] == "streamed" else [place, compile_]
    if threshold is not None:
        # Around what is compiled, so that a skipped block is not, and within the offloading. Group offload with a
        # stream removes a hook of its own after the first forward; diffusers 0.42 then loses the hook around that one.
        steps = [compile_, partial(cache_first_block, threshold=threshold), place]
    for step in steps:
        step(pipeline, subject)
    check(pipeline, subject, name, start, placement)
    return pipeline


def check(pipeline: DiffusionPipeline, model: Model, name: str, start: str, placement: str) -> None:
    """Whether the weights are what the name of a combination says: of that kind, and moved in that way.

    Raises:
        TutorialError: a component is not quantized and should be, or the other way round; or is not where it should be.
    """
    for part, sizes in devices.component_footprints(pipeline).items():
        module = getattr(pipeline, part)
        # A checkpoint that comes quantized says itself which of its parts are, and how.
        for kind in () if model.is_quantized else sorted({*WEIGHTS.values()}):
            if (kind in sizes) != (WEIGHTS.get(start) == kind and part in model.quantized):
                has, wanted = (kind, "none") if kind in sizes else (f"no {kind}", "some")
                raise TutorialError(
                    f"{name}: the {part} holds {has} weights and should hold {wanted}: mend this strategy."
                )
        found, wanted = _how_moved(module), _how_to_move(pipeline, model, part, placement)
        if found != wanted:
            raise TutorialError(f"{name}: the {part} is {found} and should be {wanted}: mend this strategy.")
    for part in model.denoisers:
        cached = getattr(getattr(pipeline, part), "is_cache_enabled", False)
        if cached != (split_cache(name)[1] is not None):
            raise TutorialError(f"{name}: the {part} has {'a' if cached else 'no'} cache: mend this strategy.")
    if streamed := re.fullmatch(f"streamed, {LIMIT}", placement):
        handles = [module._streamed for module in devices.component_modules(pipeline).values()]
        parcels = [parcel for handle in handles for parcel in (*handle.parcels, handle.rest)]
        stays = sum(parcel.bytes for parcel in parcels if parcel.host is None) / devices.GB
        if stays > float(streamed[1]):
            raise TutorialError(f"{name}: {stays:.3f} GB stay on the accelerator: mend this strategy.")


def _how_to_move(pipeline: DiffusionPipeline, model: Model, part: str, placement: str) -> str:
    """What `_how_moved` must say of a component."""
    rest = (*model.text_encoders, *model.vaes)
    if placement.startswith("streamed"):
        return "streamed"
    if placement == "model offload" and part not in pipeline._exclude_from_cpu_offload:
        return "moved as a whole"
    if "group offload" in placement and part in model.denoisers:
        kind = "leaf_level" if placement.startswith("leaf") else "block_level"
        return f"moved by {kind}" + (" with the rest on the card" if "rest on the card" in placement else "")
    if ("group offload" in placement and part in rest) or (placement[:4] == "text" and part in model.text_encoders):
        return "moved by leaf_level"
    return "on the accelerator"


def _how_moved(module: torch.nn.Module) -> str:
    """How a component comes to the accelerator, by its hooks; without any, where its weights are."""
    if hasattr(module, "_streamed"):
        is_whole = hasattr(module, "decode")  # a VAE comes and goes as a whole
        # A block of nothing but small tensors has no parcel: it is not streamed.
        count = sum(hasattr(block, "_streamed") for block in find_blocks(module))
        in_force = is_whole or count == len(module._streamed.parcels)
        return "streamed" if in_force else "streamed in part"
    if is_model_offloaded(module):
        return "moved as a whole"
    registries = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    hooks = [hook for hook in (registry.get_hook("group_offloading") for registry in registries) if hook is not None]
    if hooks:
        levels = " and ".join(sorted({hook.config.offload_type.value for hook in hooks}))
        top = HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading")
        emptied = top is not None and not (top.group.modules or top.group.parameters or top.group.buffers)
        return f"moved by {levels}" + (" with the rest on the card" if emptied and levels == "block_level" else "")
    places = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    return "on the accelerator" if places <= {devices.accelerator().type} else f"on {' and '.join(sorted(places))}"

"""Reads the shape of a model from the headers of its weights and from its configurations: no weight is read."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from helpers import checks, models
from helpers.errors import TutorialError
from helpers.shapes import NF4_BYTES, Kind, Part, Shape

Tensors = dict[str, tuple[int, ...]]  # name of a weight to its shape

# Matrices that bitsandbytes leaves as they are: embeddings, the last projection of a language model, T5's `wo`.
NOT_QUANTIZED = re.compile(
    r"embed_tokens|shared\.|token_embedding|position_embedding|relative_attention|lm_head|\.wo\."
)
ONCE = re.compile(r"norm|mod|ada|time|temb")  # matrices that are used once in a forward, and not on each token
TEXT = re.compile(r"add_|context|txt|attn2\.to_[kv]|text")
CROSS = re.compile(r"attn2\.to_k|cross_attn|cross_attention")
BLOCK = re.compile(r"^(.*?transformer_blocks\.\d+|.*?\b(?:[a-z_]*blocks?|layers?|[a-z_]*refiner|h)\.\d+)\.")
IN_PARTS = re.compile("Wan|QwenImage|CogVideoX")  # video VAEs that decode a few frames at a time
CLIP = 81  # frames of a clip where a pipeline does not say: Wan's
PAD = 77  # tokens of a prompt where a pipeline does not say: CLIP's


def read_shape(path: str) -> Shape:
    """The shape of a folder in diffusers format, or of a repository id: from the headers of its files.

    `huggingface_hub.get_safetensors_metadata` reads those at the root of a repository; a pipeline's lie in folders, so
    that each file is asked for its header, some hundred kB.

    Raises:
        TutorialError: it is no such model, its weights have no headers, or the Hub cannot be reached.
    """
    path = models.find_path(path)
    if not Path(path).is_dir():
        try:
            cached = snapshot_download(path, local_files_only=True)
            path = cached if checks.find_fault(Path(cached)) is None else path
        except (LocalEntryNotFoundError, HFValidationError):
            with checks.hub_errors(path):
                checks.hub_files(path)  # it fails at once where there is no network; a download tries six times
    model = models.find_model(path)
    headers, largest_file = _folder_headers(path) if Path(path).is_dir() else _hub_headers(path)
    if missing := [name for name in (*model.denoisers, *model.text_encoders, *model.vaes) if not headers.get(name)]:
        raise TutorialError(f"{path} has no safetensors files of {missing[0]}, so that its sizes cannot be read.")
    return shape_of(model, headers, largest_file, partial(models._read_json, path))


def _folder_headers(path: str) -> tuple[dict[str, Tensors], int]:
    """The weights of each component of a folder, and the bytes of the largest file."""
    headers, largest = {}, 0
    for file in sorted(Path(path).glob("*/*.safetensors")):
        with safe_open(file, "np") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
            for name in [name for name in found if ".quant_state." in name]:  # nf4 already: what shape it had
                state = json.loads(bytes(weights.get_tensor(name)).decode())
                found[name.partition(".quant_state.")[0]] = tuple(state["shape"])
        headers.setdefault(file.parent.name, {}).update(found)
        largest = max(largest, file.stat().st_size)
    return {name: _plain(tensors) for name, tensors in headers.items()}, largest


def _hub_headers(path: str) -> tuple[dict[str, Tensors], int]:
    """The same of a repository: of a component that has its weights twice, not those in float16."""
    headers, largest = {}, 0
    with checks.hub_errors(path):
        for file, size in checks.hub_files(path):
            if file.endswith(".safetensors") and file.count("/") == 1:
                found = HfApi().parse_safetensors_file_metadata(path, file).tensors
                variants = headers.setdefault(file.split("/")[0], {})
                shapes = {name: tuple(info.shape) for name, info in found.items()}
                variants.setdefault(".fp16" in file, {}).update(shapes)
                largest = max(largest, size)
    if any(".quant_state." in name for variants in headers.values() for names in variants.values() for name in names):
        raise TutorialError(f"{path} is quantized, and its headers do not say from what: give the model that it was.")
    return {name: variants.get(False) or variants[True] for name, variants in headers.items()}, largest


def _plain(tensors: Tensors) -> Tensors:
    """Without what bitsandbytes keeps beside a weight."""
    beside = re.compile(r"\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$")
    return {name: shape for name, shape in tensors.items() if not beside.search(name)}


def shape_of(model: models.Model, headers: dict[str, Tensors], largest_file: int, read: Callable) -> Shape:
    """Put a shape together. `read` reads a JSON file of the model by its name."""
    classes = {name: model.component_class(name) for name in headers}
    kept = {name: getattr(cls, "_keep_in_fp32_modules", None) or () for name, cls in classes.items()}
    kept |= dict.fromkeys(model.text_encoders, ())  # transformers does that for float16 only
    parts = {name: _weigh(tensors, name in model.quantized, kept[name]) for name, tensors in headers.items()}
    configs = {name: read(f"{name}/config.json") for name in (*model.denoisers, *model.vaes)}
    denoiser, vae = configs[model.denoisers[0]], configs[model.vaes[0]] if model.vaes else {}
    kinds, rest, convolved = [], (0, 0), 0
    for name in model.denoisers:
        found, outside = _kinds(headers[name], kept[name])
        kinds += found
        rest = tuple(map(sum, zip(rest, _sizes(outside, True, kept[name]), strict=True)))
        convolved += sum(
            math.prod(shape) // 4 ** _level(key, outside) for key, shape in outside.items() if len(shape) > 2
        )
    parameters = models.call_parameters(model.path)
    spatial, temporal, packed = _compression(denoiser, vae)
    sizes = {name: _default(parameters, name, None) for name in ("height", "width")}
    sample = denoiser.get("sample_size")
    side = sample * spatial // packed if isinstance(sample, int) else 1024
    call = {name: size or side for name, size in sizes.items()}
    call |= {
        "frames": _default(parameters, "num_frames", CLIP if "num_frames" in parameters else 1),
        "steps": _default(parameters, "num_inference_steps", 50),
    }
    blocks = [shape for name in model.denoisers for key, shape in headers[name].items() if _in_block(key, shape)]
    channels = vae.get("block_out_channels") or [vae.get("base_dim", 128) * n for n in vae.get("dim_mult", (1, 2))]
    patch = vae["patch_size"] if isinstance(vae.get("patch_size"), int) else 1  # LTX decodes patches of pixels
    return Shape(
        pipeline=model.pipeline_class.__name__,
        kinds=kinds,
        denoisers=len(model.denoisers),
        rest=Part(*rest),
        convolved=convolved // len(model.denoisers),
        widest=max((max(shape) for shape in blocks), default=0),
        encoders=[parts[name] for name in model.text_encoders],
        vae=Part(0, sum(parts[name].other for name in model.vaes)),
        vae_channels=max(1, channels[min(1, len(channels) - 1)] // patch**2),
        in_parts=IN_PARTS.search(vae.get("_class_name", "")) is not None,
        spatial=spatial,
        temporal=temporal,
        text=_default(parameters, "max_sequence_length", PAD),
        forwards=_forwards(parameters, denoiser, read("model_index.json"), False),
        with_negative=_forwards(parameters, denoiser, read("model_index.json"), True),
        stored=sum(map(_stored, headers.values())),
        largest=max(part.bytes for part in parts.values()),
        largest_file=largest_file,
        largest_tensor=max(
            _weigh({key: shape}, name in model.quantized, kept[name]).bytes
            for name, tensors in headers.items()
            for key, shape in tensors.items()
        ),
        quantized=model.is_quantized,
        call=call,
    )


def _stored(tensors: Tensors) -> int:
    return 2 * sum(map(math.prod, tensors.values()))


def _in_block(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and BLOCK.match(key) is not None and not ONCE.search(key)


def _sizes(tensors: Tensors, quantized: bool, kept: Sequence[str] = ()) -> tuple[int, int]:
    """Weights that become nf4, and bytes of the others: in bfloat16, but for modules `kept` in float32."""
    nf4 = other = 0
    for key, shape in tensors.items():
        in_float32 = not set(kept).isdisjoint(key.split("."))
        is_matrix = len(shape) == 2 and key.endswith(".weight") and not NOT_QUANTIZED.search(key)
        if quantized and is_matrix and not in_float32:
            nf4 += math.prod(shape)
        else:
            other += math.prod(shape) * (4 if in_float32 else 2)
    return nf4, other


def _by_block(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors by the outermost repeated block that they are in; "" for those in none."""
    blocks: dict[str, Tensors] = {}
    for key, shape in tensors.items():
        match = BLOCK.match(key)
        blocks.setdefault(match[1] if match else "", {})[key] = shape
    return blocks


def _weigh(tensors: Tensors, quantized: bool, kept: Sequence[str]) -> Part:
    sizes = {name: _sizes(part, quantized, kept) for name, part in _by_block(tensors).items()}
    blocks = [int(nf4 * NF4_BYTES + other) for name, (nf4, other) in sizes.items() if name]
    return Part(*map(sum, zip(*sizes.values(), strict=True)), max(blocks, default=0), sum(blocks))


def _level(key: str, tensors: Mapping[str, Any]) -> int:
    """How often a UNet has halved the picture where this weight is used."""
    downs = {int(match[1]) for name in tensors if (match := re.match(r"down_blocks\.(\d+)", name))}
    if not downs or not (match := re.match(r"(down|up|mid)_blocks?(?:\.(\d+))?", key)):
        return 0
    last = max(downs)
    return {"down": int(match[2] or 0), "up": last - int(match[2] or 0), "mid": last}[match[1]]


def _kinds(tensors: Tensors, kept: Sequence[str] = ()) -> tuple[list[Kind], Tensors]:
    """The blocks of a denoiser, those that are alike together; and what is outside of them."""
    blocks = _by_block(tensors)
    outside = blocks.pop("", {})
    unet = any(key.startswith("down_blocks.") for key in tensors)
    if unet:  # its blocks are those of transformers within them
        for name in [name for name in blocks if "transformer_blocks" not in name]:
            outside |= blocks.pop(name)
    cross = any(CROSS.search(key) for key in tensors)
    counts: dict[Kind, int] = {}
    for name, part in blocks.items():
        nf4, other = _sizes(part, True, kept)
        matrices = {key.removeprefix(name): shape for key, shape in part.items() if _in_block(key, shape)}
        text = sum(math.prod(shape) for key, shape in matrices.items() if TEXT.search(key))
        used = sum(map(math.prod, matrices.values())) - text
        inputs = [shape[1] for shape in matrices.values()]
        width = max(set(inputs), key=inputs.count, default=0)
        kind = Kind(1, nf4, other, used, text, not cross, width, _level(name, tensors) if unet else 0)
        counts[kind] = counts.get(kind, 0) + 1
    return [Kind(**vars(kind) | {"count": count}) for kind, count in counts.items()], outside


def _compression(denoiser: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
    """Pixels of a token each way, frames of a token, and latent points of a token each way."""
    channels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult") or (1,) * 4
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or 2 ** (len(channels) - 1)
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 1
    if "temperal_downsample" in vae and "scale_factor_temporal" not in vae:  # so spelt by Wan and Qwen
        temporal = 2 ** sum(vae["temperal_downsample"])
    if scaling := vae.get("spatio_temporal_scaling"):  # LTX
        spatial = vae.get("patch_size", 1) * 2 ** sum(scaling)
        temporal = vae.get("patch_size_t", 1) * 2 ** sum(scaling)
    latent = vae.get("latent_channels") or vae.get("z_dim") or 0
    patch = denoiser.get("patch_size") or (denoiser.get("all_patch_size") or [1])[0]
    packed = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if latent and denoiser.get("in_channels") == 4 * latent:  # FLUX packs 2 x 2 latent points before it begins
        packed = 2
    return spatial * packed, temporal, packed


def _default(parameters: Mapping[str, Any], name: str, instead: Any) -> Any:
    """What a call has for a parameter that is not given."""
    value = parameters[name].default if name in parameters else None
    return value if isinstance(value, int) else instead


def _forwards(parameters: Mapping[str, Any], denoiser: dict[str, Any], index: dict[str, Any], negative: bool) -> int:
    """Forwards of a step: two with guidance, unless the model was trained with it.

    Where a pipeline has `true_cfg_scale`, it takes a negative prompt to have guidance.
    """

    def is_more_than_1(name: str) -> bool:
        scale = parameters[name].default if name in parameters else 1
        return isinstance(scale, (int, float)) and scale > 1

    if "true_cfg_scale" in parameters:
        return 2 if negative and is_more_than_1("true_cfg_scale") else 1
    if denoiser.get("guidance_embeds") or index.get("is_distilled"):
        return 1
    return 2 if is_more_than_1("guidance_scale") else 1

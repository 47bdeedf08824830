"""What a program must know about a checkpoint, found out by itself: its denoisers, its text encoders, its call."""

import inspect
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub import hf_hub_download, split_torch_state_dict_into_shards

from helpers import checks
from helpers.errors import TutorialError

LARGE = 0.25
"""A text encoder is large, and worth quantizing, from this share of the largest one on."""

MORE_THAN_A_PROMPT = re.compile(
    "Adapter|Control|controlnet|Edit|Fill|(?<!T)I2V|Img2Img|Inpaint|Pix2Pix|Prior|Refiner|Resolution"
    "|(Image|Video)To(Video|World)"
)
"""In the name of a pipeline or of a component: it starts from a picture or a clip."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as programs see it. All names are those of components of its pipeline.

    Attributes:
        path: folder or repository id, as `from_pretrained` takes it.
        denoisers: what runs in every step: a transformer or a UNet, or two of them.
        text_encoders: all of them.
        vaes: what turns latents into pictures.
        quantized: the denoisers and the large text encoders.
        sizes: bytes of weights of each component on disk.
        variant: "fp16" where a component has no other weights, else None.
        is_quantized: whether the checkpoint holds quantized weights already.
        saved: folder of the nf4 weights, or "" before they are written.
    """

    path: str
    denoisers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    vaes: tuple[str, ...]
    quantized: tuple[str, ...]
    sizes: dict[str, int]
    variant: str | None = None
    is_quantized: bool = False
    saved: str = ""

    def component_class(self, name: str) -> type:
        """Class of a component, from the pipeline's index."""
        return _component_class(*read_index(self.path)[name])

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """Class of the pipeline, from its index."""
        return _pipeline_class(self.path)


def find_given(path: str) -> str:
    """What `from_pretrained` takes for a folder or a repository id, which must be there.

    Raises:
        TutorialError: it is not.
    """
    path = find_path(path)
    return path if Path(path).is_dir() else checks.find_on_hub(path)


def find_path(path: str) -> str:
    """A folder that is there, or what can be a repository id, which the address of its page has in it.

    Raises:
        TutorialError: it is neither.
    """
    if path and Path(path).is_dir():
        return path
    path = re.sub(r"^https://huggingface\.co/([^/?#]+/[^/?#]+).*", r"\1", path)
    if Path(path).parent.is_dir() and "/" in path:  # checkpoints/flux looks like a repository id
        raise TutorialError(f"There is no folder {path!r}.")
    if path.count("/") != 1 or path.startswith(("/", ".", "~")) or path.endswith("/"):
        raise TutorialError(f"There is no folder {path!r}, and it is no repository id, which would be owner/name.")
    return path


def find_model(path: str) -> Model:
    """Reads the index of a checkpoint, and the sizes of its files; downloads no weights.

    Args:
        path: a folder in diffusers format, or a repository id of the Hub.

    Raises:
        TutorialError: it is no checkpoint of a pipeline, or none that draws from a prompt.
    """
    components = read_components(path)
    pipeline = read_index(path)["_class_name"]
    call = call_parameters(path)
    if "prompt" not in call:
        raise TutorialError(f"{path} is a {pipeline}, which takes no prompt: give a text-to-image or -video model.")
    needed = [name for name, parameter in call.items() if _must_be_given(parameter) and name not in ("self", "prompt")]
    if needed:
        raise TutorialError(
            f"{path} is a {pipeline}, which needs more than a prompt ({', '.join(needed)}): give a text-to-image or "
            "-video model."
        )
    classes = {name: _component_class(*entry) for name, entry in components.items()}
    if Path(path).is_dir():
        check_folder(Path(path))
    sizes, variant = _weight_sizes(path)
    for name, (library, kind) in components.items():
        if classes[name] is None and sizes.get(name) and library in ("diffusers", "transformers"):
            raise TutorialError(f"{path} has a {kind}, which your {library} does not have: use a newer {library}.")
    denoisers = tuple(name for name, cls in classes.items() if _is_denoiser(name, cls))
    if not denoisers:
        raise TutorialError(f"{path} is a {pipeline}, in which no transformer and no UNet was found.")
    encoders = tuple(name for name, cls in classes.items() if _is_text_encoder(name, cls))
    # CLIP is small beside a T5 or a language model. A pipeline may have nothing else.
    candidates = [name for name in encoders if "CLIP" not in components[name][1]] or encoders
    largest = max((sizes.get(name, 0) for name in candidates), default=0)
    large = tuple(name for name in candidates if sizes.get(name, 0) >= LARGE * largest)
    vaes = tuple(
        name
        for name, cls in classes.items()
        if _is_diffusers_model(cls) and ("Autoencoder" in cls.__name__ or "VQ" in cls.__name__)
    )
    configs = [_read_json(path, f"{name}/config.json") for name in (*denoisers, *large)]
    is_quantized = any("quantization_config" in config for config in configs)
    return Model(path, denoisers, encoders, vaes, (*denoisers, *large), sizes, variant, is_quantized)


def read_index(path: str) -> dict[str, Any]:
    """The model_index.json of a checkpoint.

    Raises:
        TutorialError: there is none, or it names no pipeline.
    """
    if Path(path).is_dir():
        check_folder(Path(path), index_only=True)
    index = _read_json(path, "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise TutorialError(f"The model_index.json of {path} names no class of diffusers: give another checkpoint.")
    return index


def check_folder(folder: Path, index_only: bool = False) -> None:
    """Check that a folder is a complete checkpoint; with `index_only`, that it has a readable model_index.json.

    Raises:
        TutorialError: it is not.
    """
    fault = checks.find_fault(folder)
    if fault is not None and (fault.startswith("model_index.json") or not index_only):
        raise TutorialError(
            f"{folder} is no complete checkpoint of a diffusers pipeline ({fault}): restore it, download it again, or "
            "give another folder or a repository id such as stabilityai/stable-diffusion-3.5-medium."
        )


def read_components(path: str) -> dict[str, list[str]]:
    """Library and class of each component of a checkpoint; [null, null] is one that it does without."""
    entries = {name: entry for name, entry in read_index(path).items() if isinstance(entry, list) and len(entry) == 2}
    return {name: entry for name, entry in entries.items() if all(isinstance(part, str) for part in entry)}


def _read_json(path: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder, which was checked, or of a repository: from the local cache if nothing newer can be had.

    Raises:
        TutorialError: the Hub cannot be reached, or does not give it.
    """
    if Path(path).is_dir():
        return json.loads(Path(path, file).read_text("utf-8"))
    with checks.hub_errors(path):
        return json.loads(Path(hf_hub_download(path, file)).read_text("utf-8"))


def call_parameters(path: str) -> Mapping[str, inspect.Parameter]:
    """The parameters that the pipeline of a checkpoint can be called with."""
    return inspect.signature(_pipeline_class(path).__call__).parameters


def _pipeline_class(path: str) -> type[DiffusionPipeline]:
    name = read_index(path)["_class_name"]
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise TutorialError(
            f"{path} is for a {name}, which diffusers {diffusers.__version__} does not have: use a newer diffusers."
        )
    return cls


def find_more(path: str) -> str:
    """Why programs/draw.py cannot draw with a pipeline, in half a sentence; "" where it can: from a prompt alone."""
    kind = _pipeline_class(path).__name__
    words = " ".join((kind, *read_components(path)))
    if "height" in call_parameters(path) and not MORE_THAN_A_PROMPT.search(words):
        return ""
    return f"A {kind} draws no picture or clip from a prompt alone"


def _must_be_given(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _component_class(library: str, name: str) -> type | None:
    """The class of a component, found as diffusers finds it; None where that fails."""
    try:
        return simple_get_class_obj(library, name)
    except (AttributeError, ImportError, ValueError):
        return None


def _is_diffusers_model(cls: type | None) -> bool:
    return isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)


def _is_denoiser(name: str, cls: type | None) -> bool:
    """By the names of the component and of its class: a "transformer" may be a HunyuanDiT2DModel."""
    words = f"{name} {cls.__name__}".lower() if _is_diffusers_model(cls) else ""
    return "transformer" in words or "unet" in words


def _is_text_encoder(name: str, cls: type | None) -> bool:
    """Called so; or a language model of transformers, whatever its name."""
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        return False
    language_model = issubclass(cls, transformers.PreTrainedModel) and cls.__name__.endswith(
        ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
    )
    return "text_encoder" in name or language_model


def _weight_sizes(path: str) -> tuple[dict[str, int], str | None]:
    """Bytes of weights by component; and "fp16" if a component has its weights in that variant only, else None.

    A component may have its weights in several formats: the largest format counts.
    """
    folder = Path(path)
    if folder.is_dir():
        files = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in folder.glob("*/*")]
    else:
        with checks.hub_errors(path):
            files = [(file, size) for file, size in checks.hub_files(path) if file.count("/") == 1]
    sizes: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}  # in the fp16 variant?
    for file, size in files:
        component, name = file.split("/")
        kind = "safetensors" if name.endswith(".safetensors") else "bin" if name.endswith(".bin") else None
        if kind:
            formats = sizes[".fp16" in name].setdefault(component, {})
            formats[kind] = formats.get(kind, 0) + size
    variant = "fp16" if sizes[True].keys() - sizes[False].keys() else None
    return {name: max(formats.values()) for name, formats in (sizes[True] | sizes[False]).items()}, variant


def find_file_size(*modules: torch.nn.Module, smallest: int = 1_000_000_000) -> int:
    """A `max_shard_size` for `save_pretrained`, in bytes, that parts no nf4 weight from its quant_state.

    Small files: what reads them later has one in memory beside its own copy. diffusers 0.42 does not load a weight
    whose quant_state is in the next file, and `save_pretrained` fills each file up whatever it parts.
    """
    states = [module.state_dict() for module in modules]
    for size in itertools.count(smallest, max(1, smallest // 100)):
        if not any(_parts_a_weight(state, size) for state in states):
            return size


def _parts_a_weight(state: dict[str, torch.Tensor], file_size: int) -> bool:
    """Whether files of this size, in bytes, have the quant_state of a weight apart from the weight."""
    files = split_torch_state_dict_into_shards(state, max_shard_size=file_size).tensor_to_filename
    owners = {key: key.partition(".weight.")[0] + ".weight" for key in files if ".weight." in key}
    return any(files.get(owner, files[key]) != files[key] for key, owner in owners.items())


def describe(model: Model) -> str:
    """One line for each component that matters, with its size."""
    lines = []
    for role, names in (("denoiser", model.denoisers), ("text encoder", model.text_encoders), ("VAE", model.vaes)):
        for name in names:
            nf4 = ", quantized to nf4" if name in model.quantized else ""
            lines.append(f"  {role:12}  {name:16}  {model.sizes.get(name, 0) / 1e9:8.3f} GB on disk{nf4}")
    return "\n".join(lines)

"""What the benchmark must know about a checkpoint, found out by itself: its denoisers, its text encoders, its call."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from helpers.errors import TutorialError

LARGE = 0.25
"""A text encoder is large, and worth quantizing, from this share of the largest one on."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as the strategies see it. All names are those of components of its pipeline.

    Attributes:
        path: folder or repository id, as `from_pretrained` takes it.
        denoisers: what runs in every step: a transformer or a UNet, or two of them.
        text_encoders: all of them.
        vaes: what turns latents into pictures.
        quantized: the denoisers and the large text encoders.
        sizes: bytes of weights of each component on disk.
        saved: folder of the nf4 weights, or "" before they are written.
    """

    path: str
    denoisers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    vaes: tuple[str, ...]
    quantized: tuple[str, ...]
    sizes: dict[str, int]
    saved: str = ""

    def component_class(self, name: str) -> type:
        """Class of a component, from the pipeline's index."""
        return _component_class(*DiffusionPipeline.load_config(self.path)[name])

    def is_quantized(self) -> bool:
        """Whether the checkpoint holds quantized weights already."""
        configs = (self.component_class(name).load_config(self.path, subfolder=name) for name in self.denoisers)
        return any("quantization_config" in config for config in configs)

    def outside_blocks(self) -> list[str]:
        """Names of the denoisers' own children that are not lists of blocks: embedders, last norm, projection."""
        names = []
        for name in self.denoisers:
            cls = self.component_class(name)
            with torch.device("meta"):
                denoiser = cls.from_config(cls.load_config(self.path, subfolder=name))
            names += [
                child
                for child, module in denoiser.named_children()
                if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
            ]
        return sorted(set(names))


def find_model(path: str) -> Model:
    """Reads the index of a checkpoint, and the sizes of its files; downloads no weights.

    Args:
        path: a folder in diffusers format, or a repository id of the Hub.

    Raises:
        TutorialError: it is no checkpoint of a pipeline, or none that draws from a prompt.
    """
    try:
        index = DiffusionPipeline.load_config(path)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TutorialError(
            f"{path} is no checkpoint of a diffusers pipeline ({reason}): give a folder with a model_index.json, or a "
            "repository id such as stabilityai/stable-diffusion-3.5-medium."
        ) from None
    components = {
        name: entry for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is not None
    }
    pipeline = index.get("_class_name")
    call = call_parameters(path)
    if "prompt" not in call:
        raise TutorialError(f"{path} is a {pipeline}, which takes no prompt: give a text-to-image or -video model.")
    classes = {name: _component_class(*entry) for name, entry in components.items()}
    # Names of classes, not of components: a pipeline may call its second denoiser what it likes.
    denoisers = tuple(
        name
        for name, cls in classes.items()
        if _is_diffusers_model(cls) and any(word in cls.__name__ for word in ("Transformer", "UNet"))
    )
    if not denoisers:
        raise TutorialError(f"{path} is a {pipeline}, in which no transformer and no UNet was found.")
    sizes = _weight_sizes(path)
    encoders = tuple(name for name in components if name.startswith("text_encoder"))
    # CLIP is small beside a T5 or a language model. A pipeline may have nothing else.
    candidates = [name for name in encoders if "CLIP" not in components[name][1]] or encoders
    largest = max((sizes.get(name, 0) for name in candidates), default=0)
    large = tuple(name for name in candidates if sizes.get(name, 0) >= LARGE * largest)
    vaes = tuple(
        name for name, cls in classes.items() if _is_diffusers_model(cls) and cls.__name__.startswith("Autoencoder")
    )
    return Model(path, denoisers, encoders, vaes, (*denoisers, *large), sizes)


def call_parameters(path: str) -> Mapping[str, inspect.Parameter]:
    """The parameters that the pipeline of a checkpoint can be called with."""
    name = DiffusionPipeline.load_config(path)["_class_name"]
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise TutorialError(
            f"{path} is for a {name}, which diffusers {diffusers.__version__} does not have: use a newer diffusers."
        )
    return inspect.signature(cls.__call__).parameters


def _component_class(library: str, name: str) -> type | None:
    """The class of a component; None for one that is in neither library."""
    return getattr(diffusers, name, None) or getattr(transformers, name, None)


def _is_diffusers_model(cls: type | None) -> bool:
    return cls is not None and issubclass(cls, diffusers.ModelMixin)


def _weight_sizes(path: str) -> dict[str, int]:
    """Bytes of weights by component. A component may have its weights in several formats: the largest format counts."""
    folder = Path(path)
    if folder.is_dir():
        files = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in folder.glob("*/*")]
    else:
        try:
            siblings = HfApi().model_info(path, files_metadata=True).siblings or []
        except HfHubHTTPError.__bases__ as error:
            raise TutorialError(f"The Hub cannot be asked about {path} ({type(error).__name__}): try again.") from None
        files = [(file.rfilename, file.size or 0) for file in siblings if file.rfilename.count("/") == 1]
    sizes: dict[str, dict[str, int]] = {}
    for file, size in files:
        component, name = file.split("/")
        kind = "safetensors" if name.endswith(".safetensors") else "bin" if name.endswith(".bin") else None
        if kind and ".fp16." not in name:
            formats = sizes.setdefault(component, {})
            formats[kind] = formats.get(kind, 0) + size
    return {component: max(formats.values()) for component, formats in sizes.items()}


def describe(model: Model) -> str:
    """One line for each component that matters, with its size."""
    lines = []
    for role, names in (("denoiser", model.denoisers), ("text encoder", model.text_encoders), ("VAE", model.vaes)):
        for name in names:
            nf4 = ", quantized to nf4" if name in model.quantized else ""
            lines.append(f"  {role:12}  {name:16}  {model.sizes.get(name, 0) / 1e9:8.3f} GB on disk{nf4}")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """A `Model` as a dictionary of plain JSON values, as another process gets it."""
    return json.loads(json.dumps(value))

"""Writes a model's exact shapes with random weights, once, into the cache folder: no download, no token.

    python -m benchmarks.random_checkpoints flux          # as bf16: what a real run loads
    python -m benchmarks.random_checkpoints flux --nf4    # transformer and large text encoder in 4 bits

GB of disk:                         bf16  --nf4
    flux        FLUX.1-dev            34     11
    wan         Wan2.1-T2V-14B        40     14
    klein       FLUX.2-klein-4B       16      5
    z-image     Z-Image-Turbo         20      6
    qwen-image  Qwen-Image            58     18
    wan22       Wan2.2-T2V-A14B       69     23
    flux2-dev   FLUX.2-dev           113     34

`python -m benchmarks --checkpoint random-klein` measures it, and random-klein-nf4 the combinations of saved nf4.
A picture or video drawn with it is noise, but time and memory are those of the real model: they depend on shapes, not
on values. The shapes, and what stands in for tokenizers and schedulers, are in benchmarks/families.py.

Each weight is made and, for nf4, quantized on the accelerator, one at a time: any card can do it, and the host holds
one file of at most 10 GB. The nf4 checkpoint needs no bf16 one.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm
from transformers.quantizers.auto import AutoHfQuantizer

from benchmarks.families import FAMILIES, Family, qwen_tokenizer
from helpers import checkpoints, checks, devices, files
from helpers.errors import TutorialError

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}

# The largest file of weights, in bytes, as most are published: it decides how much host memory loading takes.
FILE_SIZE = 5e9
NF4_FILE_SIZE = 1e9  # as programs/save_nf4.py writes them


def create(model: str, name: str, nf4: bool = False) -> torch.nn.Module:
    """One component on the meta device, which takes no memory and no time; with `nf4`, ready for nf4 weights.

    The libraries' own quantizers choose the layers, so that they are those of quantizing at load.
    """
    component, config = FAMILIES[model].components[name]
    from_transformers = issubclass(component, transformers.PreTrainedModel)
    with torch.device("meta"):
        module = component(component.config_class(**config)) if from_transformers else component(**config)
    if nf4 and name in FAMILIES[model].quantized:
        if from_transformers:
            quantization = transformers.BitsAndBytesConfig(**NF4)
            AutoHfQuantizer.from_config(quantization, pre_quantized=False).preprocess_model(module, device_map=None)
            module.config.quantization_config = quantization
        else:
            quantization = diffusers.BitsAndBytesConfig(**NF4)
            quantizer = DiffusersAutoQuantizer.from_config(quantization, pre_quantized=False)
            kept = module._keep_in_fp32_modules or []
            quantizer.preprocess_model(module, device_map=None, keep_in_fp32_modules=kept)
            module.register_to_config(quantization_config=quantization)
    return module


def count_parameters(model: str) -> dict[str, int]:
    """Number of parameters of each component."""
    components = FAMILIES[model].components
    return {name: sum(part.numel() for part in create(model, name).parameters()) for name in components}


def stored_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a component: its parameters and, of FLUX.2's VAE, the statistics of a norm.

    A parameter that stands in two places, such as T5's embedding, comes once.
    """
    everywhere = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    statistics = {name: tensor for name, tensor in module.state_dict().items() if name not in everywhere}
    return dict(module.named_parameters()) | statistics


def stored_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a tensor of a component on the meta device, once it is written. Small tables are left out."""
    if isinstance(parameter, Params4bit):
        return parameter.numel() // 2 + 4 * -(-parameter.numel() // parameter.blocksize)
    return 2 * parameter.numel()


def random_tensor(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random bf16 values for a parameter, on the generator's device; norms start as ones, biases as zeros."""
    dtype = torch.bfloat16 if parameter.is_floating_point() else parameter.dtype  # a norm counts its batches
    tensor = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
    if name.endswith("gamma"):  # the norms of Wan's VAE, which have more than one dimension
        return tensor.fill_(1.0)
    if parameter.dim() > 1:
        return tensor.normal_(0, 0.02, generator=generator)
    return tensor.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)


def make_tensors(name: str, parameter: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of one parameter, in host memory: one tensor, or the four of an nf4 weight."""
    tensor = random_tensor(name, parameter, generator)
    if not isinstance(parameter, Params4bit):
        return {name: tensor.cpu()}
    packed, state = quantize_4bit(
        tensor,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
    )
    parts = {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {key: value.cpu() for key, value in parts.items()}


def write_file(path: Path, tensors: dict[str, torch.Tensor], bar: tqdm) -> None:
    """Writes a safetensors file tensor by tensor, so that the bar moves.

    The format: length of the header, header in JSON, data (https://huggingface.co/docs/safetensors/index#format). The
    widest numbers come first, which keeps every tensor aligned.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}[tensor.dtype]
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(tensor.flatten().view(torch.uint8).numpy())
            bar.update(tensor.nbytes / 2)


def write_component(module: torch.nn.Module, folder: Path, file_size: float, bar: tqdm, seed: int = 0) -> None:
    """Writes a component that is on the meta device into `folder` with random weights, as `save_pretrained` would.

    A byte moves the bar by one half when it is made, and by the other half when it is written.
    """
    folder.mkdir()
    if isinstance(module, transformers.PreTrainedModel):
        module.config.architectures = [type(module).__name__]
        for config in (module.config, *(getattr(module.config, name) for name in module.config.sub_configs)):
            config.dtype = "bfloat16"
        module.config.save_pretrained(folder)
        stem = "model"
    else:
        module.save_config(folder)
        stem = "diffusion_pytorch_model"

    device = devices.accelerator()
    parameters = stored_tensors(module)
    largest = max(2 * parameter.numel() for parameter in parameters.values())
    if device.type != "cpu" and 3 * largest > torch.accelerator.get_memory_info()[0]:
        device = torch.device("cpu")  # slower, and the card need not hold it
    generator = torch.Generator(device).manual_seed(seed)

    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        files.append(list(pending))
        write_file(folder / f"{len(files)}.safetensors", pending, bar)
        pending.clear()

    for name, parameter in parameters.items():
        # The parts of an nf4 weight must be in one file.
        if pending and sum(tensor.nbytes for tensor in pending.values()) + stored_bytes(parameter) > file_size:
            flush()
        made = make_tensors(name, parameter, generator)
        pending |= made
        bar.update(sum(tensor.nbytes for tensor in made.values()) / 2)
    flush()

    if len(files) == 1:
        (folder / "1.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(stored_bytes(parameter) for parameter in parameters.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_small_parts(family: Family, pocket: Path | None, folder: Path) -> None:
    """Writes the index, the tokenizers and the scheduler: those of the pocket model, or of the entry."""
    index = {"_class_name": family.pipeline, "_diffusers_version": diffusers.__version__}
    if pocket:
        index = json.loads((pocket / "model_index.json").read_text(encoding="utf-8"))
        for name in index:
            if name not in family.components and (pocket / name).is_dir():
                (folder / name).mkdir()
                for file in (pocket / name).iterdir():  # copytree would wrap the error of a full disk
                    shutil.copy(file, folder / name)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(**family.scheduler)
        for name, part in {"scheduler": scheduler, "tokenizer": qwen_tokenizer()}.items():
            part.save_pretrained(folder / name)
            index[name] = class_entry(type(part))
    index |= {name: class_entry(component) for name, (component, _) in family.components.items()} | family.settings
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def class_entry(component: type) -> list[str]:
    """Library and name of a class, as an index has them."""
    return [component.__module__.split(".")[0], component.__name__]


def write_checkpoint(model: str, nf4: bool, folder: Path) -> None:
    """Writes all of a checkpoint into the new folder `folder`.

    Raises:
        TutorialError: the disk has too little room, or the pocket model is missing.
    """
    family = FAMILIES[model]
    pocket = Path(checkpoints.PACKAGE_ROOT, "checkpoints", f"pocket-{family.pocket}") if family.pocket else None
    if pocket and not (pocket / "model_index.json").is_file():
        raise TutorialError(
            f"The tokenizer and the scheduler are those of checkpoints/{pocket.name}, which is missing: restore it "
            f"with `git checkout -- checkpoints/{pocket.name}`."
        )
    modules = {name: create(model, name, nf4) for name in family.components}
    total = sum(stored_bytes(tensor) for module in modules.values() for tensor in stored_tensors(module).values())
    files.check_space(folder.parent, total + 1e9, "The random checkpoint", checkpoints.OTHER_CACHE)
    print(f"Writing {folder.stem}, {files.size(total)}, into {folder.parent}.", flush=True)

    folder.mkdir()
    write_small_parts(family, pocket, folder)
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for name, module in modules.items():
            bar.set_description(name)
            file_size = NF4_FILE_SIZE if nf4 else family.file_sizes.get(name, FILE_SIZE)
            # Of two experts, the second has other weights: were they swapped, the picture would show it.
            write_component(module, folder / name, file_size, bar, seed=int(name == "transformer_2"))


def build(model: str, nf4: bool = False) -> Path:
    """Folder of the random checkpoint of `model`, a name in `FAMILIES`, built first if it is missing or incomplete.

    It is written into a folder beside it, which is renamed at the end: an interrupted build is never taken for a whole
    one, and the next one removes what it left.

    Raises:
        TutorialError: the disk is too small or cannot be written, or another process is building the same checkpoint.
    """
    folder = checkpoints.cache_folder() / f"random-{model}{'-nf4' if nf4 else ''}"
    if _is_complete(folder):
        return folder
    part = folder.with_name(folder.name + ".part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The system frees this lock when the process ends, however it ends.
        with WeakFileLock(folder.with_name(folder.name + ".lock"), timeout=1):
            if _is_complete(folder):
                return folder
            for leftover in (part, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                write_checkpoint(model, nf4, part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except TimeoutError:
        raise TutorialError(f"Another process is building {folder}: wait until it is done.") from None
    except OSError as error:
        raise files.cannot_write(folder, error, checkpoints.OTHER_CACHE) from None
    return folder


def _is_complete(folder: Path) -> bool:
    return folder.is_dir() and checkpoints.find_fault(folder) is None


def main() -> None:
    """Builds the checkpoint that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(FAMILIES))
    parser.add_argument("--nf4", action="store_true", help="as nf4 instead of bf16, in a folder of its own")
    arguments = parser.parse_args()
    try:
        checks.check_versions()
        print(f"The checkpoint is in {build(arguments.model, arguments.nf4)}")
    except TutorialError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted: what was written is removed; run the same command to build it from the start.")


if __name__ == "__main__":
    main()

"""Writes FLUX.1-dev's or Wan2.1-T2V-14B's exact shapes with random weights, once, into the cache folder.

    python -m benchmarks.random_checkpoints flux          # 34 GB of disk, as bf16: what a real run loads
    python -m benchmarks.random_checkpoints flux --nf4    # 11 GB: transformer and large text encoder in 4 bits
    python -m benchmarks.random_checkpoints wan [--nf4]   # 40 GB, 14 GB

A picture or video drawn with it is noise, but time and memory are those of the real model: they depend on shapes, not
on values. The shapes are those of the published configurations (https://huggingface.co/black-forest-labs/FLUX.1-dev
and https://huggingface.co/Wan-AI/Wan2.1-T2V-14B-Diffusers). Tokenizers and scheduler are the pocket model's.

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
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm
from transformers import CLIPTextModel, T5EncoderModel, UMT5EncoderModel
from transformers.quantizers.auto import AutoHfQuantizer

from helpers import checkpoints, checks, devices, files
from helpers.errors import TutorialError

# The encoders of T5 XXL and UMT5 XXL differ in their vocabulary, and UMT5 has a position bias in each layer.
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

# Each model's components that have weights: name to class and configuration.
COMPONENTS = {
    "flux": {
        "transformer": (
            FluxTransformer2DModel,
            {
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
        ),
        "text_encoder_2": (T5EncoderModel, {"vocab_size": 32128, **T5_XXL}),
        "text_encoder": (
            CLIPTextModel,
            {
                "vocab_size": 49408,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "projection_dim": 768,
                # Those of the pocket model's tokenizer.
                "pad_token_id": 0,
                "eos_token_id": 1,
                "bos_token_id": 2,
            },
        ),
        "vae": (
            AutoencoderKL,
            {
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "latent_channels": 16,
                "sample_size": 1024,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
            },
        ),
    },
    "wan": {
        "transformer": (
            WanTransformer3DModel,
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": 40,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "freq_dim": 256,
                "ffn_dim": 13824,
                "num_layers": 40,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
                "eps": 1e-6,
            },
        ),
        "text_encoder": (UMT5EncoderModel, {"vocab_size": 256384, **T5_XXL}),
        "vae": (AutoencoderKLWan, {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}),
    },
}

QUANTIZED = {"flux": ("transformer", "text_encoder_2"), "wan": ("transformer", "text_encoder")}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}

# The largest file of weights, in bytes, as published: it decides how much host memory loading takes.
FILE_SIZE = 5e9
FILE_SIZES = {("flux", "transformer"): 10e9}
NF4_FILE_SIZE = 1e9  # as programs/save_nf4.py writes them


def create(model: str, name: str, nf4: bool = False) -> torch.nn.Module:
    """One component on the meta device, which takes no memory and no time; with `nf4`, ready for nf4 weights.

    The libraries' own quantizers choose the layers, so that they are those of quantizing at load.
    """
    component, config = COMPONENTS[model][name]
    from_transformers = issubclass(component, transformers.PreTrainedModel)
    with torch.device("meta"):
        module = component(component.config_class(**config)) if from_transformers else component(**config)
    if nf4 and name in QUANTIZED[model]:
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
    return {name: sum(part.numel() for part in create(model, name).parameters()) for name in COMPONENTS[model]}


def stored_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter of a component on the meta device, once it is written. Small tables are left out."""
    if isinstance(parameter, Params4bit):
        return parameter.numel() // 2 + 4 * -(-parameter.numel() // parameter.blocksize)
    return 2 * parameter.numel()


def random_tensor(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Random bf16 values for a parameter, on the generator's device; norms start as ones, biases as zeros."""
    tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
    if name.endswith("gamma"):  # the norms of Wan's VAE, which have more than one dimension
        return tensor.fill_(1.0)
    if parameter.dim() > 1:
        return tensor.normal_(0, 0.02, generator=generator)
    return tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def make_tensors(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> dict[str, torch.Tensor]:
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
        kind = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
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
        module.config.architectures, module.config.dtype = [type(module).__name__], "bfloat16"
        module.config.save_pretrained(folder)
        stem = "model"
    else:
        module.save_config(folder)
        stem = "diffusion_pytorch_model"

    device = devices.accelerator()
    parameters = dict(module.named_parameters())  # a weight that stands in two places (T5's embedding) comes once
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


def write_checkpoint(model: str, nf4: bool, folder: Path) -> None:
    """Writes all of a checkpoint into the new folder `folder`.

    Raises:
        TutorialError: the disk has too little room, or the pocket model is missing.
    """
    pocket = Path(checkpoints.PACKAGE_ROOT, "checkpoints", f"pocket-{model}")
    if not (pocket / "model_index.json").is_file():
        raise TutorialError(
            f"The tokenizer and the scheduler are those of checkpoints/pocket-{model}, which is missing: restore it "
            f"with `git checkout -- checkpoints/pocket-{model}`."
        )
    modules = {name: create(model, name, nf4) for name in COMPONENTS[model]}
    total = sum(stored_bytes(parameter) for module in modules.values() for parameter in module.parameters())
    files.check_space(folder.parent, total + 1e9, "The random checkpoint", checkpoints.OTHER_CACHE)
    print(f"Writing {folder.stem}, {files.size(total)}, into {folder.parent}.", flush=True)

    folder.mkdir()
    shutil.copy(pocket / "model_index.json", folder)
    for name in json.loads((pocket / "model_index.json").read_text(encoding="utf-8")):
        if name not in modules and (pocket / name).is_dir():
            (folder / name).mkdir()
            for file in (pocket / name).iterdir():  # copytree would wrap the error of a full disk
                shutil.copy(file, folder / name)
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for name, module in modules.items():
            bar.set_description(name)
            file_size = NF4_FILE_SIZE if nf4 else FILE_SIZES.get((model, name), FILE_SIZE)
            write_component(module, folder / name, file_size, bar)


def build(model: str, nf4: bool = False) -> Path:
    """Folder of the random checkpoint of `model` ("flux" or "wan"), built first if it is missing or incomplete.

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
    parser.add_argument("model", choices=list(COMPONENTS))
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

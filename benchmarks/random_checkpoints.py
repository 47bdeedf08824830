"""Writes FLUX.1-dev's exact shapes with random weights, once, into the cache folder.

    python -m benchmarks.random_checkpoints flux

A picture drawn with it is noise, but time and memory are those of the real model: they depend on shapes, not on values.
The shapes are those of the published configurations (https://huggingface.co/black-forest-labs/FLUX.1-dev). The
tokenizers are the pocket model's.
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from helpers import checkpoints, measure
from helpers.errors import TutorialError

TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # those of the pocket model's tokenizers


def flux_components() -> dict[str, Callable[[], torch.nn.Module]]:
    """The components of FLUX.1-dev that have weights: name to a function that builds it on the current device."""
    return {
        "transformer": lambda: FluxTransformer2DModel(
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        "text_encoder_2": lambda: T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                **TOKENS,
            )
        ),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
    }


def count_parameters() -> dict[str, int]:
    """Number of parameters of each component, counted on the meta device: it takes no memory and no time."""
    with torch.device("meta"):
        return {
            name: sum(parameter.numel() for parameter in build().parameters())
            for name, build in flux_components().items()
        }


def fill(module: torch.nn.Module, device: torch.device, generator: torch.Generator) -> torch.nn.Module:
    """Gives a module built on the meta device random bf16 weights on `device`; norms start as ones, biases as zeros."""
    module.to(torch.bfloat16).to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # T5's embedding stands in two places
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module.eval()


def build_flux(folder: Path, seed: int = 0) -> None:
    """Builds the checkpoint in `folder`, component by component; does nothing if it is there and complete.

    It is written beside it first and renamed at the end, so that an interrupted build is never taken for a whole one.

    Raises:
        TutorialError: the disk has too little room.
    """
    if folder.is_dir() and checkpoints.find_fault(folder) is None:
        print("The checkpoint is there already.")
        return
    part = folder.with_name(folder.name + ".part")
    for leftover in (part, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    needed, free = 2e-9 * sum(count_parameters().values()) + 1, shutil.disk_usage(part).free / 1e9
    if free < needed:
        part.rmdir()
        raise TutorialError(
            f"The random checkpoint needs {needed:.0f} GB of disk and {folder.parent} has {free:.0f} GB free: "
            "free some space or set TUTORIAL_CACHE to a folder on a larger disk."
        )
    pocket = Path(checkpoints.PACKAGE_ROOT, "checkpoints", "pocket-flux")
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(pocket / name, part / name)
    shutil.copy(pocket / "model_index.json", part)
    for name, build in tqdm(flux_components().items(), desc="components", unit="component"):
        with torch.device("meta"):
            module = build()
        device = measure.accelerator()
        size = 2 * sum(parameter.numel() for parameter in module.parameters())
        if device.type != "cpu" and size > 0.9 * torch.accelerator.get_memory_info()[0]:
            device = torch.device("cpu")  # slower, and the card need not hold it
        fill(module, device, torch.Generator(device).manual_seed(seed)).save_pretrained(part / name)
        del module
        gc.collect()
    part.rename(folder)
    print(f"written to {folder}")


def main() -> None:
    """Builds the checkpoint that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["flux"])
    model = parser.parse_args().model
    try:
        build_flux(checkpoints.cache_folder() / f"random-{model}")
    except TutorialError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

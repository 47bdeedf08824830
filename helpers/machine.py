"""What this machine has, line by line: whether it is enough for the lessons, and what to do if it is not."""

import platform
import shutil
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants, get_token

from helpers import checks, cpu_backend, devices
from helpers.errors import TutorialError

HOST_GB = 2  # what the lessons take with the pocket models
FULL_HOST_GB = 20  # what draw.py takes with Wan2.1-T2V-14B: its weights and what Wan2.2 takes beside; FLUX.1-dev: 14
FULL_CARD_GB = 6  # the smallest card that a recorded row fits
FULL_DISK_GB = 46  # FLUX.1-dev in bfloat16 and in nf4
ENOUGH, POCKET = "yes", "for the pocket models"


def line(what: str, here: str, enough: str, instead: str) -> dict[str, str]:
    """A line of the table; what to do stands only where something is not enough."""
    return {"what": what, "here": here, "enough": enough, "what to do": "" if enough == ENOUGH else instead}


def check_machine() -> list[dict[str, str]]:
    """The table's lines. It measures nothing and needs no network."""
    return [_accelerator(), _memory(), _host(), _disk(), _versions(), _compiler(), _token()]


def _accelerator() -> dict[str, str]:
    device, here = devices.accelerator().type, devices.device_name()
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) and torch.version.hip is None:
        return line(
            "accelerator", here, "slow", "it computes bfloat16 by emulation: take a newer card for large models"
        )
    if device in ("cuda", "xpu"):
        return line("accelerator", here, ENOUGH, "")
    if shutil.which("nvidia-smi"):
        return line("accelerator", here, "no", "PyTorch does not see the card: install its CUDA build (pytorch.org)")
    return line("accelerator", here, POCKET, "nothing; large models need a card")


def _memory() -> dict[str, str]:
    if not devices.has_memory_statistics():
        return line("memory of it", "none of its own", POCKET, "nothing")
    free, total = (count / devices.GB for count in torch.accelerator.get_memory_info())
    here = f"{free:.1f} of {total:.1f} GB free"
    if total < FULL_CARD_GB:
        return line("memory of it", here, POCKET, "smaller pictures: section 5 says which")
    return line("memory of it", here, ENOUGH if free > 0.8 * total else "in part", "end other programs on the card")


def _host() -> dict[str, str]:
    memory = psutil.virtual_memory()
    free, total = memory.available / devices.GB, memory.total / devices.GB
    here = f"{free:.1f} of {total:.1f} GB free"
    if free < HOST_GB:
        return line("host memory", here, "no", f"end other programs: the lessons take {HOST_GB} GB")
    return line(
        "host memory", here, ENOUGH if free > FULL_HOST_GB else POCKET, "large models: see section 5, or add swap"
    )


def _disk() -> dict[str, str]:
    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / devices.GB
    enough = ENOUGH if free > FULL_DISK_GB else POCKET if free > 1 else "no"
    return line("disk", f"{free:.0f} GB free", enough, "set HF_HOME to a folder on a larger disk")


def _versions() -> dict[str, str]:
    here = f"Python {platform.python_version()}, torch {torch.__version__}"
    try:
        checks.check_versions()
    except TutorialError as error:
        return line("versions", here, "no", str(error))
    return line("versions", here, ENOUGH, "")


def _compiler() -> dict[str, str]:
    if cpu_backend.has_gpu():
        return line("compiler", "Triton, of PyTorch", ENOUGH, "")
    try:
        cpu_backend.check_compiler()
    except TutorialError as error:
        return line("compiler", "none", "no", str(error))
    return line("compiler", "for C++", ENOUGH, "")


def _token() -> dict[str, str]:
    if get_token():
        return line("Hub token", "there", ENOUGH, "")
    return line("Hub token", "none", "but for gated models", "accept FLUX.1-dev's licence, then `hf auth login`")

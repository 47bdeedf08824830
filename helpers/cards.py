"""Cards: how fast they compute and copy, from what is published of them."""

import contextlib
import re
from dataclasses import dataclass

import torch

from helpers.devices import GB
from helpers.errors import TutorialError


@dataclass(frozen=True)
class Card:
    """Dense bf16 Tflop/s with float32 sums, GB/s of its memory, and GB/s of its bus."""

    tflops: float
    memory: float
    bus: float


# GeForce: twice the float32 of the shaders, as in the appendix of NVIDIA's Ada white paper
# (https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf) and in those of Ampere GA102
# and RTX Blackwell. A100, H100, H200: https://www.nvidia.com/en-us/data-center/a100/, .../h100/ and .../h200/; the
# buses of the last two as recorded in benchmarks/results. Other buses: 25 GB/s for 16 lanes of PCIe 4 as in lesson 3,
# half of that for 8 lanes, twice that for PCIe 5.
CARDS = {
    "RTX 3050 6GB": Card(13.5, 168, 12.5),
    "RTX 4060": Card(30.2, 272, 12.5),
    "RTX 3060": Card(25.5, 360, 25),
    "RTX 4070": Card(58.3, 504, 25),
    "RTX 5070": Card(61.7, 672, 50),
    "RTX 4060 Ti": Card(44.1, 288, 12.5),
    "RTX 5060 Ti": Card(47.4, 448, 25),
    "RTX 4080": Card(97.5, 717, 25),
    "RTX 5080": Card(112.6, 960, 50),
    "RTX 3090": Card(71.2, 936, 25),
    "RTX 4090": Card(165.2, 1008, 25),
    "RTX 5090": Card(209.5, 1792, 50),
    "A100": Card(312, 1555, 25),
    "H100": Card(989, 3350, 50),
    "H200": Card(989, 4800, 53.8),
}
OLD = re.compile(r"^(tesla)?(t4|t10|v100|p100|p40|gtx\d+|20\d0|titan)")  # before Ampere
# A usual card by its memory in GB.
USUAL = {6: "RTX 3050 6GB", 8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 40: "A100"}
USUAL |= {80: "H100", 140: "H200"}


def find_card(name: str) -> tuple[str, Card]:
    """A card by its name, however it is written ("NVIDIA GeForce RTX 4090", "4090"), or by three figures "142/500/25".

    Raises:
        TutorialError: nothing is known of it.
    """
    figures = re.fullmatch("/".join([r"(\d+(?:\.\d+)?)"] * 3), name)
    if figures and min(map(float, figures.groups())) > 0:
        return name, Card(*map(float, figures.groups()))
    plain = re.sub(r"nvidia|geforce|rtx|gpu|\s|-", "", name.lower())
    for known in CARDS:
        if (key := re.sub(r"rtx|\s", "", known.lower())) == plain or re.match(rf"{key}(\d*gb|hbm)", plain):
            return known, CARDS[known]
    if OLD.search(plain):
        raise TutorialError(f"{name!r} emulates bfloat16, which is slow: nothing is known of it, so there is no plan.")
    raise TutorialError(
        f"No figures are known of {name!r}: name one that is like it ({', '.join(CARDS)}), or give "
        "its bf16 Tflop/s, GB/s of memory and GB/s of bus as 142/500/25."
    )


def usual_gb(name: str) -> int | None:
    """The memory in GB of a usual card of this name; None where cards of that name differ in it.

    Raises TutorialError as `find_card`.
    """
    found, _ = find_card(name)
    return next((gb for gb, usual in USUAL.items() if usual == found), None)


def usual_card(gb: float) -> str:
    """A card that has about this much memory."""
    return USUAL[max((size for size in USUAL if size <= gb), default=min(USUAL))]


def this_card() -> tuple[str, float] | None:
    """Name and GB of this machine's card, if it is one whose figures are known."""
    if torch.cuda.is_available():
        with contextlib.suppress(TutorialError):
            name, _ = find_card(torch.cuda.get_device_name())
            return name, torch.cuda.get_device_properties(0).total_memory / GB
    return None

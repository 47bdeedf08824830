"""What a pipeline's memory and time follow from: the bytes of its blocks, and what is used on which tokens."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).parent / "known_shapes.json"  # of the models with recorded rows; a test computes it anew
NF4_BYTES = 4.5 / 8  # 4 bits, and a scale of 32 bits for each 64 weights


@dataclass(frozen=True)
class Kind:
    """Blocks of a denoiser that are alike.

    Attributes:
        count: how many there are.
        nf4: weights of a block that become nf4.
        other: bytes of the rest of a block, in bfloat16.
        used: weights that are used on each token of the picture.
        text: weights that are used on each token of the text.
        joint: whether its attention runs over both.
        width: channels of its attention.
        level: how often a UNet has halved the picture there.
    """

    count: int
    nf4: int
    other: int
    used: int
    text: int
    joint: bool
    width: int
    level: int = 0

    @property
    def bytes(self) -> float:
        """Bytes of one block in nf4."""
        return self.nf4 * NF4_BYTES + self.other


@dataclass(frozen=True)
class Part:
    """A component that runs once.

    Attributes:
        nf4: weights that become nf4.
        other: bytes of the rest, in bfloat16.
        largest: bytes of its largest block, in nf4.
        in_blocks: bytes of all its blocks, in nf4.
    """

    nf4: int
    other: int
    largest: int = 0
    in_blocks: int = 0

    @property
    def bytes(self) -> float:
        """Bytes with nf4 weights."""
        return self.nf4 * NF4_BYTES + self.other


@dataclass(frozen=True)
class Shape:
    """All of a pipeline that its memory and its time follow from."""

    pipeline: str
    kinds: list[Kind]
    denoisers: int  # two experts are both in memory, and one of them runs in a step
    rest: Part  # the denoisers outside of their blocks
    convolved: int  # weights outside of the blocks that are used on each point of a picture: a UNet's
    widest: int  # most channels of a token between two matrices of a block
    encoders: list[Part]
    vae: Part
    vae_channels: int  # at full size
    in_parts: bool  # it decodes a video a few frames at a time
    spatial: int  # pixels of a token, each way
    temporal: int  # frames of a token
    text: int  # tokens of a prompt
    forwards: int  # in a step: two with guidance
    with_negative: int  # the same with a negative prompt
    stored: int  # bytes of all weights in bfloat16
    largest: float  # bytes of the largest component, in nf4
    largest_file: int  # bytes of it, as published
    largest_tensor: float  # bytes of the largest weight, in nf4 where it becomes that: no file is smaller
    quantized: bool = False  # its files hold nf4 weights already
    call: dict[str, int] = field(default_factory=dict)  # height, width, frames and steps of a call that names none
    model: str = ""  # what recorded rows call it
    advised: dict[str, Any] = field(default_factory=dict)  # what its authors give in place of the pipeline's own

    @property
    def blocks(self) -> float:
        """Bytes of all blocks of the denoisers."""
        return sum(kind.count * kind.bytes for kind in self.kinds)

    @property
    def weights(self) -> float:
        """Bytes of all weights, in nf4 where they become that."""
        return self.blocks + self.rest.bytes + sum(part.bytes for part in self.encoders) + self.vae.bytes


def called(shape: Shape, arguments: Mapping[str, Any]) -> Shape:
    """The shape with as many forwards in a step as a call of the pipeline with these arguments has."""
    if shape.with_negative > shape.forwards:  # as Qwen-Image, which does not look at its guidance scale
        return replace(shape, forwards=shape.with_negative) if arguments.get("negative_prompt") else shape
    unguided = 0 if shape.pipeline == "ZImagePipeline" else 1  # the highest scale that asks for no second forward
    if (scale := arguments.get("guidance_scale")) is not None and scale <= unguided:
        return replace(shape, forwards=1)
    return shape


@functools.cache
def known_shapes() -> dict[str, Shape]:
    """The shapes of models with recorded rows, by repository id."""
    return {name: from_json(values) for name, values in json.loads(KNOWN.read_text("utf-8")).items()}


def from_json(values: dict[str, Any]) -> Shape:
    """A shape from what `dataclasses.asdict` made of it."""
    parts = {name: Part(**values[name]) for name in ("rest", "vae")}
    parts["encoders"] = [Part(**part) for part in values["encoders"]]
    return Shape(**values | parts | {"kinds": [Kind(**kind) for kind in values["kinds"]]})

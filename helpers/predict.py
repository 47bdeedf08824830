"""What a call takes, worked out from a model's shape: memory from the tokens, time from operations and copies.

Some factors were fitted to the recorded rows; `FITTED` lists them. `errors` sets every recorded row beside what is
worked out for it.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import records
from helpers.errors import TutorialError
from helpers.shapes import Kind, Part, Shape, known_shapes

GB = 1e9
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
REPOSITORIES = {"flux": "black-forest-labs/FLUX.1-dev", "wan": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
WANTED = {"memory": 0.1, "time": 0.25}  # how far off a figure may be

FITTED = {  # each factor, and what it was fitted to
    "busy": (0.59, "of a card's peak: compiled steps with bf16 weights"),
    "passes": (150, "more passes over the tokens for each block that is not compiled: eager steps"),
    "compiled": (2.0, "times tokens x widest layer x 2 bytes, in a compiled step: model offload"),
    "eager": (3.7, "the same, not compiled"),
    "picture": (4.8, "times pixels x channels x 2 bytes, to decode a picture: resident FLUX"),
    "clip": (7.6, "the same for frames that are decoded together: resident Wan"),
    "tiles": (0.5, "of that, to decode in tiles: lesson 3"),
    "reserved": (1.22, "bytes reserved for one of workspace: both models on the H100"),
    "filled": (0.98, "of a limit that fill_card uses, and 1.03 of what it must have: FLUX streamed"),
    "host": (1.0, "GB of the process without weights: all starts"),
    "pageable": (5.9, "GB of the host beside the weights in model offload"),
    "leaf": (1.78, "times the weights in host memory, pinned leaf by leaf"),
    "block": (2.35, "times the weights in host memory, pinned block by block"),
    "outside": (0.2, "s of a call outside of the steps, on an H100"),
    "pixels": (0.075, "s to decode a million pixels, on an H100"),
    "moved": (0.5, "s for each GB of model offload, there and back from pageable memory"),
}
FIT = {name: value for name, (value, _) in FITTED.items()}


@dataclass(frozen=True)
class Card:
    """An accelerator: its memory in GB, dense bf16 Tflop/s with float32 sums, GB/s of its memory and of its bus."""

    gb: int
    tflops: float
    memory: float
    bus: float


# GeForce: twice the float32 of the shaders (https://images.nvidia.com/aem-dam/Solutions/geforce/ada/
# nvidia-ada-gpu-architecture.pdf, appendix; the same holds in those of Ampere GA102 and of RTX Blackwell). H100 and H200:
# https://www.nvidia.com/en-us/data-center/h200/, and the bus as recorded. Buses of the others: 25 GB/s for 16 lanes of
# PCIe 4, half of that for 8, twice that for PCIe 5.
CARDS = {
    "RTX 3050 6GB": Card(6, 13.5, 168, 12.5),
    "RTX 4060": Card(8, 30.2, 272, 12.5),
    "RTX 3060": Card(12, 25.5, 360, 25),
    "RTX 4070": Card(12, 58.3, 504, 25),
    "RTX 5070": Card(12, 61.7, 672, 50),
    "RTX 4060 Ti": Card(16, 44.1, 288, 12.5),
    "RTX 5060 Ti": Card(16, 47.4, 448, 25),
    "RTX 4080": Card(16, 97.5, 717, 25),
    "RTX 5080": Card(16, 112.6, 960, 50),
    "RTX 3090": Card(24, 71.2, 936, 25),
    "RTX 4090": Card(24, 165.2, 1008, 25),
    "RTX 5090": Card(32, 209.5, 1792, 50),
    "H100": Card(80, 989, 3350, 50),
    "H200": Card(141, 989, 4800, 53.8),
}
USUAL = {6: "RTX 3050 6GB", 8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 80: "H100"}


@dataclass(frozen=True)
class Call:
    """What is drawn."""

    height: int
    width: int
    frames: int = 1
    steps: int = 28


@dataclass(frozen=True)
class Prediction:
    """What was worked out; fields as in `Measurement`. `least_gb`: what a call reserves with all blocks streamed."""

    load_peak_gb: float
    run_peak_gb: float
    reserved_gb: float
    host_peak_gb: float
    step_ms: float
    latency_s: float
    least_gb: float = 0.0
    tiled: bool = False


def find_card(name: str) -> tuple[str, Card]:
    """A card by its name, however it is written: "NVIDIA GeForce RTX 4090", "4090"."""
    plain = re.sub(r"nvidia|geforce|rtx|gpu|\s|-", "", name.lower())
    for known in sorted(CARDS, key=len, reverse=True):
        if (key := re.sub(r"rtx|\s", "", known.lower())) == plain or re.match(rf"{key}(80gb|gb|hbm)", plain):
            return known, CARDS[known]
    raise TutorialError(f"No figures are known of a {name}: name one of {', '.join(CARDS)} that is like it.")


def tokens(shape: Shape, call: Call) -> int:
    """Tokens of the picture or clip."""
    frames = (call.frames - 1) // shape.temporal + 1
    return frames * (call.height // shape.spatial) * (call.width // shape.spatial)


def operations(shape: Shape, call: Call) -> float:
    """Floating-point operations of a step: two for each token and weight, four for each pair of tokens and channel."""
    total = 2.0 * shape.convolved * tokens(shape, call)
    for kind in shape.kinds:
        picture = tokens(shape, call) // 4**kind.level
        both = picture + shape.text
        main, pairs = (both if kind.joint and not kind.text else picture), (both if kind.joint else picture) ** 2
        pairs += 0 if kind.joint else picture * shape.text
        work = 2 * (kind.used * main + kind.text * shape.text) + 4 * pairs * kind.width
        total += kind.count * work / shape.denoisers
    return shape.forwards * total


def compute_ms(shape: Shape, card: Card, call: Call, compiled: bool = True) -> float:
    """Milliseconds of a step that nothing waits for: products, weights read back to bf16, and passes over tokens."""
    seconds = operations(shape, call) / (FIT["busy"] * card.tflops * 1e12)
    nf4 = sum(kind.count * kind.nf4 for kind in shape.kinds) / shape.denoisers
    moved = shape.forwards * nf4 * (0.5 + 2)  # 4 bits are read, two bytes written
    if not compiled:
        for kind in shape.kinds:
            count = tokens(shape, call) // 4**kind.level + kind.joint * shape.text
            moved += shape.forwards * FIT["passes"] * kind.count / shape.denoisers * count * kind.width * 2
    return 1e3 * (seconds + moved / (card.memory * GB))


def workspace(shape: Shape, call: Call, compiled: bool = True) -> tuple[float, float]:
    """Bytes allocated beside the weights: in a step, and to decode."""
    width = max((kind.width for kind in shape.kinds), default=0)
    count = tokens(shape, call) + any(kind.joint for kind in shape.kinds) * shape.text
    step = 2 * shape.widest * (FIT["compiled" if compiled else "eager"] * count + width)
    together = min(call.frames, shape.temporal if shape.in_parts else call.frames)
    factor = FIT["picture" if call.frames == 1 else "clip"]
    pixels = call.height * call.width
    clip = 6.0 * pixels * call.frames if call.frames > 1 else 0  # the frames drawn, in bf16
    return step, (factor * 2 * pixels * together * shape.vae_channels + clip) * (shape.vae_channels > 0)


def read_at_once(shape: Shape) -> float:
    """Bytes in host memory to quantize: the largest file of a denoiser, or a text encoder as a whole."""
    return max([shape.largest_file, *(2 * part.nf4 + part.other for part in shape.encoders)])


def in_bf16(shape: Shape) -> Shape:
    """The shape with nothing quantized."""

    def part(old: Part) -> Part:
        grows = (2 * old.nf4 + old.other) / max(old.bytes, 1)
        return Part(0, 2 * old.nf4 + old.other, int(grows * old.largest), int(grows * old.in_blocks))

    kinds = [replace(kind, nf4=0, other=kind.other + 2 * kind.nf4) for kind in shape.kinds]
    rest, encoders = part(shape.rest), [part(encoder) for encoder in shape.encoders]
    return replace(shape, kinds=kinds, rest=rest, encoders=encoders)


def predict(
    shape: Shape,
    card: Card,
    call: Call,
    placement: str = "streamed",
    limit_gb: float = 0.0,
    compiled: bool = True,
    start: str = "saved nf4",
    hidden: bool = False,
) -> Prediction:
    """What a call takes with its weights placed as in the benchmark; streamed is what `draw.py` does.

    `hidden` says that the copies of group offload run beside the compute.
    """
    if start == "bf16":
        shape = in_bf16(shape)
    blocks, rest, vae = shape.blocks, shape.rest.bytes, shape.vae.bytes
    encoders, together = sum(part.bytes for part in shape.encoders), blocks + rest
    step_space, decode_space = workspace(shape, call, compiled)
    nf4 = sum(kind.count * kind.nf4 for kind in shape.kinds) + shape.rest.nf4
    states = (nf4 + sum(part.nf4 for part in shape.encoders)) / 16  # the scales, four bytes for 64 weights
    quantized = nf4 and shape.weights - vae - sum(part.bytes for part in shape.encoders if not part.nf4)
    on_load = {"saved nf4": 0.0, "bf16": 0.0, "nf4": quantized}[start]
    compute = compute_ms(shape, card, call, compiled)
    copied, tiled, least, streamed_gb = blocks / shape.denoisers, False, 0.0, 0.0
    # Weights on the card in the steps and while it decodes; in the host at its highest; what a step waits for.
    host, steps, decoding, step_ms = 0.0, together, vae, compute
    if placement == "resident":
        steps = decoding = on_load = shape.weights
        host = {"saved nf4": shape.largest, "bf16": shape.largest_file, "nf4": read_at_once(shape)}[start]
        host += GB * FIT["host"]
    elif placement == "text encoders offloaded":
        leaving = sum(part.bytes - part.nf4 / 16 for part in shape.encoders)  # all but the scales
        steps = decoding = on_load = shape.weights - leaving
        host = shape.largest + FIT["leaf"] * leaving + GB * FIT["host"]
    elif placement == "model offload":
        host = shape.weights + GB * FIT["pageable"]
        host = host if start != "nf4" else shape.weights + shape.largest + GB * FIT["host"]
    elif placement in ("leaf", "block"):
        steps = decoding = states + (blocks / max(1, sum(kind.count for kind in shape.kinds)))
        on_load = max(on_load, states)
        copying = shape.forwards * copied / card.bus / 1e6
        host, step_ms = FIT[placement] * shape.weights, max(compute, copying) if hidden else compute + copying
    elif placement == "streamed":
        largest = [kind.bytes for kind in shape.kinds] + [part.largest for part in shape.encoders]
        always = rest + min(2 * max(largest), blocks)
        encoding = max((part.bytes - part.in_blocks for part in shape.encoders), default=0)

        def at_least(reserved: float) -> float:
            return 1.03 * (always + max(reserved * step_space, encoding, vae + reserved * decode_space))

        if at_least(FIT["reserved"]) > limit_gb * GB:
            tiled, decode_space = decode_space > 0, FIT["tiles"] * decode_space
        least = at_least(FIT["reserved"])
        space = FIT["reserved"] * max(step_space, decode_space)
        full = shape.weights + space
        streamed_gb = min(full, FIT["filled"] * limit_gb * GB) / GB
        stay = max(0.0, min(blocks, limit_gb * GB - least)) if streamed_gb * GB < full else blocks
        steps = decoding = streamed_gb * GB - space
        on_load = max(least / 1.03 - (FIT["reserved"] - 1) * max(step_space, decode_space), steps)
        step_ms = max(compute, shape.forwards * (blocks - stay) / shape.denoisers / card.bus / 1e6)
        host = shape.weights + shape.largest + GB * FIT["host"]
    once = max(encoders, 0) if placement == "model offload" else 0
    reserved = max(steps + FIT["reserved"] * step_space, decoding + FIT["reserved"] * decode_space, once)
    slower = CARDS["H100"].tflops / card.tflops
    drawn = call.height * call.width * call.frames / 1e6 if shape.vae_channels else 0
    outside = slower * (FIT["outside"] + FIT["pixels"] * drawn)
    outside += FIT["moved"] * shape.weights / GB if placement == "model offload" else 0
    outside += encoders / card.bus / GB if placement == "streamed" else 0
    return Prediction(
        load_peak_gb=on_load / GB,
        run_peak_gb=max(steps + step_space, decoding + decode_space, once) / GB,
        reserved_gb=streamed_gb or reserved / GB,
        host_peak_gb=host / GB,
        step_ms=step_ms,
        latency_s=call.steps * step_ms / 1e3 + outside,
        least_gb=least / GB,
        tiled=tiled,
    )


NAMES = {"recipe 1": "nf4, resident, full compile", "recipe 2": "nf4, model offload, full compile"}
NAMES |= {"recipe 3": "nf4, leaf, full compile", "quantization": "nf4, resident, eager"}
NAMES |= {"quantization, torch.compile": "nf4, resident, full compile"}
NAMES |= {"quantization, torch.compile, model CPU offloading": "nf4, model offload, full compile"}
PLACED = re.compile(r"resident|text encoders offloaded|model offload|leaf|block|streamed, (?P<limit>[\d.]+) GB")


def predict_row(row: records.Measurement) -> Prediction | None:
    """What is worked out for a recorded row; None if its name says no way to place weights."""
    name = NAMES.get(row.name, row.name)
    placed = PLACED.search(name)
    if not placed or row.failure:
        return None
    shape = known_shapes()[REPOSITORIES[row.model]]
    alone = (row.call or {}).get("output_type") == "latent"  # the transformer alone, loaded in host memory
    if alone:
        shape = replace(shape, encoders=[], vae=Part(0, 0), vae_channels=0, largest=shape.blocks)
    call = Call(row.height or 1024, row.width or 1024, row.frames or 1, row.steps or 28)
    placement = placed[0] if placed["limit"] is None else "streamed"
    starts = [start for start in ("saved nf4", "bf16") if name.startswith(start)]
    start = starts[0] if starts else "saved nf4" if alone else "nf4"
    hidden = "with record_stream" in name or "stream, record_stream" in name or "with the rest" in name
    _, card = find_card(row.device)
    return predict(shape, card, call, placement, float(placed["limit"] or 0), "compile" in name, start, hidden)


def errors(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Each figure of memory and time of every recorded row of a GPU, and how far what is worked out is off."""
    found = []
    for file in sorted(folder.glob("*.json")):
        rows = json.loads(file.read_text("utf-8"))
        if not isinstance(rows, list) or "name" not in rows[0]:
            continue
        for row in records.load_measurements(file):
            if row.model not in REPOSITORIES or row.checkpoint_size == "pocket" or (made := predict_row(row)) is None:
                continue
            for figure in ("load_peak_gb", "run_peak_gb", "reserved_gb", "host_peak_gb", "step_ms", "latency_s"):
                recorded, expected = getattr(row, figure), getattr(made, figure)
                if recorded and (row.source is None or figure == "latency_s"):
                    wanted = WANTED["memory" if figure.endswith("_gb") else "time"]
                    off = expected / recorded - 1
                    found.append({"file": file.stem, "name": row.name, "figure": figure, "recorded": recorded})
                    found[-1] |= {"worked out": expected, "off": off, "hit": abs(off) <= wanted}
    return found

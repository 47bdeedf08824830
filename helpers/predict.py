"""What a call takes, worked out from a model's shape: memory from the tokens, time from operations and copies.

Some factors were fitted to the recorded rows; `FITTED` lists them. `helpers.prediction_errors` sets every
recorded row beside what is worked out for it.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import records
from helpers.cards import CARDS, GB, Card
from helpers.checkpoints import PACKAGE_ROOT
from helpers.shapes import Part, Shape, called, known_shapes

RESULTS = PACKAGE_ROOT / "benchmarks" / "results"
REPOSITORIES = {shape.model: name for name, shape in known_shapes().items()}

VAE_BYTES = 1.6e8  # FLUX's, the smallest of those that the time of decoding was fitted to
SAVE = "save_nf4.py --device cuda"
# Files whose streamed rows were measured while `fill_card` held each file of weights to its end. It takes less host
# memory now, as flux-random_host-memory_nvidia-h200 shows, so that figure of theirs is not used.
OLD_FILLING = ("flux-random_nvidia-h100-80gb-hbm3", "flux-random_streamed_nvidia-h200")
OLD_FILLING += ("wan-random_nvidia-h100-80gb-hbm3", "klein-random_nvidia-h200", "z-image-random_nvidia-h200")

FITTED = {  # each factor, and what it was fitted to
    "busy": (0.59, "of a card's peak: compiled steps with bf16 weights"),
    "passes": (150, "more passes over the tokens for each block that is not compiled: eager steps"),
    "compiled": (2.0, "times tokens x widest layer x 2 bytes, in a compiled step: model offload"),
    "eager": (3.7, "the same, not compiled"),
    "picture": (4.8, "times pixels x channels x 2 bytes, to decode a picture: resident FLUX"),
    "one frame": (11.1, "the same for a picture, by a VAE that decodes videos in parts: resident Qwen-Image"),
    "clip": (7.6, "the same for frames that are decoded together: resident Wan"),
    "tiles": (0.5, "of that, to decode in tiles: lesson 3"),
    "reserved": (1.2, "bytes reserved for one of workspace: both models on the H100"),
    "filled": (0.98, "of a limit that fill_card uses, and 1.03 of what it must have: FLUX streamed"),
    "host": (1.1, "GB of the process without weights: all starts"),
    "file": (1.2, "GB of the host for a file of saved nf4, of 1 GB each: four models, resident and streamed"),
    "pageable": (5.9, "GB of the host beside the weights in model offload, but for a small model"),
    "leaf": (1.78, "times the weights in host memory, pinned leaf by leaf"),
    "block": (2.35, "times the weights in host memory, pinned block by block"),
    "outside": (0.14, "s of a call outside of the steps, on an H100: calls of 4 to 28 steps"),
    "pixels": (0.075, "s to decode a million pixels, on an H100"),
    "moved": (0.5, "s for each GB of model offload, there and back from pageable memory"),
}
FIT = {name: value for name, (value, _) in FITTED.items()}


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
    factor = FIT["clip" if call.frames > 1 else "one frame" if shape.in_parts else "picture"]
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
    denoiser = (sum(kind.count * kind.bytes for kind in kinds) + rest.bytes) / shape.denoisers
    largest = max([denoiser, *(encoder.bytes for encoder in encoders)])
    return replace(shape, kinds=kinds, rest=rest, encoders=encoders, largest=largest)


def predict(
    shape: Shape,
    card: Card,
    call: Call,
    placement: str = "streamed",
    limit_gb: float = 0.0,
    compiled: bool = True,
    start: str = "saved nf4",
    hidden: bool = False,
    whole_files: bool = False,
) -> Prediction:
    """What a call takes with its weights placed as in the benchmark; streamed is what `draw.py` does.

    `hidden` says that the copies of group offload run beside the compute, `whole_files` that a component is one file.
    """
    if start == "bf16":
        shape = in_bf16(shape)
    blocks, rest, vae = shape.blocks, shape.rest.bytes, shape.vae.bytes
    encoders, together = sum(part.bytes for part in shape.encoders), blocks + rest
    step_space, decode_space = workspace(shape, call, compiled)
    nf4 = sum(kind.count * kind.nf4 for kind in shape.kinds) + shape.rest.nf4
    # A file is in the host beside what is loaded of it.
    file = shape.largest if whole_files else max(GB * FIT["file"], shape.largest_tensor)
    file = shape.largest_file if start == "bf16" else file
    states = (nf4 + sum(part.nf4 for part in shape.encoders)) / 16  # the scales, four bytes for 64 weights
    quantized = nf4 and shape.weights - vae - sum(part.bytes for part in shape.encoders if not part.nf4)
    on_load = {"saved nf4": 0.0, "bf16": 0.0, "nf4": quantized}[start]
    compute = compute_ms(shape, card, call, compiled)
    copied, tiled, least, streamed_gb = blocks / shape.denoisers, False, 0.0, 0.0
    # Weights on the card in the steps and while it decodes; in the host at its highest; what a step waits for; and
    # what PyTorch had reserved before, and keeps.
    host, steps, decoding, step_ms, kept = 0.0, together / shape.denoisers, vae, compute, 0.0
    if placement == "resident":
        steps = decoding = on_load = shape.weights
        host = (read_at_once(shape) if start == "nf4" else file) + GB * FIT["host"]
    elif placement == "text encoders offloaded":
        leaving = sum(part.bytes - part.nf4 / 16 for part in shape.encoders)  # all but the scales
        steps = decoding = on_load = shape.weights - leaving
        host = file + FIT["leaf"] * leaving + GB * FIT["host"]
    elif placement == "model offload":
        twice = shape.largest + GB * FIT["host"]  # no more than one component is there a second time
        host = shape.weights + (twice if start == "nf4" else min(twice, GB * FIT["pageable"]))
    elif placement in ("leaf", "block"):
        steps = decoding = states + (blocks / max(1, sum(kind.count for kind in shape.kinds)))
        on_load, kept = max(on_load, states), on_load  # which model offload gives back
        copying = shape.forwards * copied / card.bus / 1e6
        host, step_ms = FIT[placement] * shape.weights, max(compute, copying) if hidden else compute + copying
    elif placement == "streamed":
        largest = [kind.bytes for kind in shape.kinds] + [part.largest for part in shape.encoders]
        always = rest + min(2 * max(largest), blocks)
        encoding = max((part.bytes - part.in_blocks for part in shape.encoders), default=0)

        def at_least(reserved: float) -> float:
            return 1.03 * (always + max(reserved * step_space, encoding, vae + reserved * decode_space))

        tried = min(at_least(1) / 1.03, limit_gb * GB)
        small_tiles = call.frames > 1 or shape.in_parts  # for other VAEs a picture is mostly one tile
        if at_least(FIT["reserved"]) > limit_gb * GB and small_tiles:
            tiled, decode_space = decode_space > 0, FIT["tiles"] * decode_space
        least = at_least(FIT["reserved"])
        space = FIT["reserved"] * max(step_space, decode_space)
        full = shape.weights + space
        streamed_gb = min(full, FIT["filled"] * limit_gb * GB) / GB
        steps = decoding = streamed_gb * GB - space
        # In the steps, blocks have the room that decoding takes later.
        stay = limit_gb * GB - 1.03 * (always + FIT["reserved"] * step_space)
        stay = max(0.0, min(blocks, stay)) if streamed_gb * GB < full else blocks
        steps = max(steps, min(together, streamed_gb * GB - FIT["reserved"] * step_space))
        on_load = max(tried, decoding)
        step_ms = max(compute, shape.forwards * (blocks - stay) / shape.denoisers / card.bus / 1e6)
        host = shape.weights + file + GB * FIT["host"]
    once = max(encoders, 0) if placement == "model offload" else 0
    reserved = max(steps + FIT["reserved"] * step_space, decoding + FIT["reserved"] * decode_space, once, on_load)
    reserved = max(reserved, kept + FIT["reserved"] * max(step_space, decode_space)) if kept else reserved
    slower = CARDS["H100"].tflops / card.tflops
    drawn = call.height * call.width * call.frames / 1e6 if shape.vae_channels else 0
    small = min(1.0, shape.vae.bytes / VAE_BYTES)  # a small VAE decodes faster
    outside = slower * (FIT["outside"] + FIT["pixels"] * small * drawn)
    outside += FIT["moved"] * shape.weights / GB if placement == "model offload" else 0
    outside += encoders / card.bus / GB if placement == "streamed" else 0
    intervals = [step_ms] * max(1, call.steps - 1)
    if placement == "model offload" and shape.denoisers > 1:  # in one of them the experts change places
        intervals[0] += 1e3 * FIT["moved"] * together / shape.denoisers / GB
    return Prediction(
        load_peak_gb=on_load / GB,
        run_peak_gb=max(steps + step_space, decoding + decode_space, once) / GB,
        reserved_gb=streamed_gb or reserved / GB,
        host_peak_gb=host / GB,
        step_ms=statistics.median(intervals),
        latency_s=call.steps * step_ms / 1e3 + outside,
        least_gb=least / GB,
        tiled=tiled,
    )


def shape_of_row(row: records.Measurement) -> Shape:
    """The shape of a recorded row's model, with the forwards that its call had."""
    return called(known_shapes()[REPOSITORIES[row.model]], row.call or {})


@dataclass(frozen=True)
class Recorded:
    """What was measured: rows of the model that is asked for, and a run of `save_nf4.py` with the GB that it read."""

    rows: Sequence[records.Measurement] = ()
    save: dict[str, Any] | None = None
    save_gb: float = 0.0
    save_is_of_model: bool = False


def load_rows(file: Path) -> list[records.Measurement]:
    """The rows of a file, none if it holds something else; without their host memory where by now less is taken."""
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, list) or not content or "name" not in content[0]:
        return []
    rows = records.load_measurements(file)
    if file.stem in OLD_FILLING:
        rows = [replace(row, host_peak_gb=None) if "streamed" in row.name else row for row in rows]
    return rows


def load_recorded(model: str, shapes: dict[str, Shape], folder: Path = RESULTS) -> Recorded:
    """The recorded rows of a repository id, of full size; and the last run of `save_nf4.py`."""
    rows, save = [], None
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("limits_"):
            content = json.loads(file.read_text("utf-8"))
            save = next((row for row in content if row.get("program") == SAVE and row.get("call_s")), save)
        measured = load_rows(file)
        rows += [row for row in measured if REPOSITORIES.get(row.model) == model and row.checkpoint_size != "pocket"]
    of = REPOSITORIES.get(save["model"], "") if save else ""
    return Recorded(rows, save, shapes[of].stored / GB if of else 0.0, of == model)

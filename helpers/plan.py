"""What to type for a model, a card and its host memory, and what that takes, each figure with its reason.

    python -m helpers.plan black-forest-labs/FLUX.1-dev --card 12 --ram 32
    python -m helpers.plan FOLDER --gpu "RTX 4090" --height 768 --width 768
    python -m helpers.plan --check

A recorded row is used where there is one; otherwise figures are worked out from the sizes in the headers of the
model's files. No weights are downloaded. `--check` shows how far what is worked out is from what was recorded.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from helpers import models, records
from helpers.cards import GB, Card, find_card, this_card, usual_card, usual_gb
from helpers.errors import TutorialError
from helpers.files import size
from helpers.headers import read_shape
from helpers.predict import Call, Prediction, Recorded, load_recorded, predict, read_at_once, shape_of_row
from helpers.prediction_errors import describe_errors
from helpers.shapes import Shape, called, known_shapes

CUDA_GB = 0.7  # what CUDA takes beside what PyTorch reserves
DISPLAY_GB = 0.3
SYSTEM_GB = 1.5  # what the system keeps of the host's memory
STREAMED = re.compile(r"saved nf4, streamed, ([\d.]+) GB, regional compile")
RESIDENT = "saved nf4, resident, regional compile"
CPU_S = 14.5  # to quantize a GB on two CPU cores: lesson 2's 8 minutes for 33 GB
COMPILE_S = 20  # to compile the blocks, where no row says it
SIZES = ("height", "width", "frames", "steps")
OPTIONS = (*SIZES, "guidance_scale", "negative_prompt")
START_S = 2.5  # a GB of nf4 weights: to copy them out of their files and page-lock that; 1.5 to 4 in the rows


@dataclass(frozen=True)
class Request:
    """What is asked: a model, the memory of the card and of the host in GB, and the card's name."""

    model: str
    card_gb: float
    ram_gb: float
    gpu: str
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Figure:
    """One figure, as text, and where it comes from."""

    text: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The lines to type, what they take, and what stands in the way, in a sentence; "" if nothing does."""

    lines: list[str]
    figures: dict[str, Figure] = field(default_factory=dict)
    problem: str = ""


def recommend(request: Request, shape: Shape, recorded: Recorded) -> Plan:
    """What to type, and what it takes. It reads nothing: all that it needs is given."""
    name, card = find_card(request.gpu)
    asked = {key: value for key in OPTIONS if (value := getattr(request, key)) is not None}
    options = {key: value for key in OPTIONS if (value := (shape.advised | asked).get(key)) is not None}
    if shape.call["frames"] == 1 and request.frames:
        raise TutorialError(f"{request.model} draws pictures: leave --frames out.")
    for side in ("height", "width"):
        if (pixels := asked.get(side, 0)) % shape.spatial:
            least = max(pixels // shape.spatial, 1) * shape.spatial
            near = f"{least} or {least + shape.spatial}"
            raise TutorialError(f"{request.model} draws multiples of {shape.spatial} pixels: let --{side} be {near}.")
    call, shape = Call(*((shape.call | options)[key] for key in SIZES)), called(shape, options)
    limit = math.floor(10 * (request.card_gb - CUDA_GB - DISPLAY_GB) + 1e-6) / 10
    row, given = _choose(recorded.rows, shape, card, call, limit)
    compile_s, of = _compile_s(recorded.rows)
    both = {way: predict(shape, card, call, limit_gb=given, compiled=way) for way in (True, False)}
    gains_s = (both[False].step_ms - both[True].step_ms) * call.steps / 1e3
    compiled = gains_s > compile_s
    made = both[compiled]
    if made.least_gb > limit:
        takes = f"With every block streamed a call takes {size(made.least_gb * GB)}"
        return Plan([], {}, f"{takes}, and this card leaves {max(limit, 0):.1f}: draw smaller, or fewer frames.")
    lines, figures, saving_gb = _saving(request, shape, recorded)
    texts = {key: quoted(value) if key == "negative_prompt" else f"{value:g}" for key, value in options.items()}
    typed = [f"--{key.replace('_', '-')} {text}" for key, text in texts.items()]
    words = ["python programs/draw.py", _folder(request, shape), '"a prompt"', f"--memory-gb {given:g}", *typed]
    lines.append(" ".join([*words, *(["--compile"] if compiled else [])]))
    drawing, host_gb = _drawing(made, row, given, shape, call, (name, card), compile_s if compiled else 0)
    why = f"compiling takes {compile_s:.0f} s ({of}) and saves {seconds(gains_s)}"
    figures |= drawing | {"--compile": Figure("yes" if compiled else "no", f"{why}: worked out")}
    if row is None:
        figures["least"] = Figure(
            f"{size(made.least_gb * GB)} reserved", "all blocks streamed; decoding may be half off"
        )
    if made.tiled:
        figures["decoding"] = Figure("in tiles", f"whole it needs more than {given:g} GB: worked out")
    left_gb, problem = request.ram_gb - SYSTEM_GB, ""
    what, most_gb = ("Drawing", host_gb) if host_gb >= saving_gb else ("Saving", saving_gb)
    if most_gb > left_gb:
        problem = f"{what} takes {most_gb:.1f} GB of host memory, and {request.ram_gb:g} GB leave {left_gb:.1f} beside "
        problem += "the system: add swap space, which is slow, or "
        problem += "take a smaller model." if host_gb > left_gb else "save on another machine."
    return Plan(lines, figures, problem)


def _choose(
    rows: Sequence[records.Measurement], shape: Shape, card: Card, call: Call, limit: float
) -> tuple[records.Measurement | None, float]:
    """The row of this limit or the next lower, and the limit to type: the row's, if more is no use.

    Of several rows those of the same card come first, then the fastest: a quiet machine's.
    """
    fits = [row for row in rows if STREAMED.fullmatch(row.name) and row.reserved_gb and _limit(row) <= limit]
    fits = [row for row in fits if (row.height, row.width, row.frames or 1) == (call.height, call.width, call.frames)]
    row = max(fits, key=lambda row: (_limit(row), find_card(row.device)[1] == card, -row.latency_s), default=None)
    if row is None:
        return None, limit
    more, less = (predict(shape, card, call, limit_gb=gb) for gb in (limit, _limit(row)))
    return row, limit if more.step_ms < 0.95 * less.step_ms or more.tiled < less.tiled else _limit(row)


def _limit(row: records.Measurement) -> float:
    return float(STREAMED.fullmatch(row.name)[1])


def _compile_s(rows: Sequence[records.Measurement]) -> tuple[float, str]:
    """Seconds that compiling the blocks adds to a first call, and how that is known."""
    resident = [row for row in rows if row.name == RESIDENT and row.first_call_s]
    if not resident:
        return COMPILE_S, "as for FLUX and Wan"
    slowest = max(resident, key=lambda row: row.first_call_s - row.latency_s)
    return slowest.first_call_s - slowest.latency_s, f"row of {find_card(slowest.device)[0]}"


def _drawing(
    made: Prediction,
    row: records.Measurement | None,
    given: float,
    shape: Shape,
    call: Call,
    on: tuple[str, Card],
    compile_s: float,
) -> tuple[dict[str, Figure], float]:
    """What `draw.py` takes, and the GB of host memory among it: as recorded, carried over, or worked out."""
    name, card = on
    speed = f"{card.tflops:g} Tflop/s and {card.bus:g} GB/s of the {name}"
    reserved_gb, host_gb, step_s = made.reserved_gb, made.host_peak_gb, made.step_ms / 1e3
    outside_s = made.latency_s - call.steps * step_s
    memory, host = "worked out: weights, workspace of this size", "worked out: all weights, and a file of them"
    step, begin_s = f"worked out: operations, and {speed}", START_S * shape.weights / GB + step_s + compile_s
    begin = "worked out: to copy the weights, to page-lock that, " + ("to compile, " if compile_s else "") + "one step"
    if row is not None:
        there_name, there = find_card(row.device)
        of = f"row of {_limit(row):g} GB, {there_name}"
        forwards = shape_of_row(row).forwards
        base = predict(replace(shape, forwards=forwards), there, call, limit_gb=_limit(row))
        step_s *= row.step_ms / base.step_ms
        outside_s *= (row.latency_s - row.steps * row.step_ms / 1e3) / (
            base.latency_s - call.steps * base.step_ms / 1e3
        )
        host_gb, host = (row.host_peak_gb, of) if row.host_peak_gb else (host_gb, host)
        if given == _limit(row):
            reserved_gb, memory = row.reserved_gb, of
        step = of if there_name == name else f"{of}, carried over: {speed}"
        step += (
            "" if forwards == shape.forwards else f"; forwards in a step: {shape.forwards}, in the row's: {forwards}"
        )
        step += "" if compile_s else "; eager, the row is compiled: worked out"
        if compile_s and there_name == name:
            begin_s, begin = row.load_s, f"{of}, compiling included"
    begin_s, drawn_s = max(begin_s, 1), call.steps * step_s + outside_s
    figures = {
        "memory of the card": Figure(f"{size(reserved_gb * GB)} reserved", memory),
        "host memory": Figure(size(host_gb * GB), host),
        "before it draws": Figure(seconds(begin_s), begin),
        "a step": Figure(seconds(step_s), step),
        drawn(call): Figure(seconds(drawn_s), f"{call.steps} steps, the prompt, the decoding"),
        "one run of draw.py": Figure(seconds(begin_s + drawn_s), "both"),
    }
    return figures, host_gb


def _saving(request: Request, shape: Shape, recorded: Recorded) -> tuple[list[str], dict[str, Figure], float]:
    """The line that saves nf4 weights, once, and what it takes, with the GB of host memory among it.

    Nothing for a model that is nf4 already.
    """
    if shape.quantized:
        return [], {}, 0.0
    row, stored_gb = recorded.save, shape.stored / GB
    line = f"python programs/save_nf4.py {shlex.quote(request.model)} {_folder(request, shape)}"
    card_gb, host_gb = 1.02 * shape.largest / GB, read_at_once(shape) / GB + 1.1
    memory, host = "worked out: the largest part in nf4", "worked out: the largest file or text encoder"
    if row and recorded.save_is_of_model:
        card_gb, host_gb = row["reserved_gb"], row["host_peak_gb"]
        memory = host = f"run of save_nf4.py, {find_card(row['device'])[0]}"
    if card_gb > request.card_gb - CUDA_GB - DISPLAY_GB:
        line, time_s, why = f"{line} --device cpu", CPU_S * stored_gb, "lesson 2's run on two CPU cores, by GB"
        card, memory = "none", f"{card_gb:.1f} GB would not fit: on the CPU"
        host_gb = max(host_gb, (shape.largest_file + shape.largest) / GB + 1.1)
        host = "worked out: a file beside the largest part in nf4, or the largest text encoder"
    else:
        per_gb = row["call_s"] / recorded.save_gb if row else 0.5
        card, time_s = f"{size(card_gb * GB)} reserved", per_gb * stored_gb
        why = "recorded run, by GB; a slow disk adds to it"
    disk = f"and {size(shape.stored)} for the model in bfloat16, or {size(2 * shape.stored)} in float32"
    figures = {
        "to save: memory of the card": Figure(card, memory),
        "to save: host memory": Figure(size(host_gb * GB), host),
        "to save: disk": Figure(size(shape.weights), disk),
        "to save: time": Figure(seconds(max(time_s, 1)), why),
    }
    return [line], figures, host_gb


def _folder(request: Request, shape: Shape) -> str:
    """Where the nf4 weights are."""
    name = Path(request.model).name.lower()
    return shlex.quote(request.model if shape.quantized else f"nf4-{name}")


def drawn(call: Call) -> str:
    """What a call draws, in words."""
    pixels = f"{call.width}x{call.height}"
    return f"a picture of {pixels}" if call.frames == 1 else f"a clip of {call.frames} frames, {pixels}"


def quoted(text: str) -> str:
    """An argument for a shell: in double quotes, which every shell knows, unless it has signs of meaning there."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def seconds(value: float) -> str:
    """A time, with no more digits than are known."""
    if value < 1:
        return f"{1e3 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.1f} min" if value < 600 else f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def find_plan(request: Request) -> Plan:
    """`recommend` with what is known of the model: its recorded rows, else the headers of its files."""
    shapes = known_shapes()
    path = models.find_path(request.model)
    request = replace(request, model=path)
    if path not in shapes and (more := models.find_more(path)):
        raise TutorialError(f"{more}, as draw.py does: there is no plan for it.")
    shape = shapes.get(path) or read_shape(path)
    alike = [name for name, other in shapes.items() if (other.kinds, other.rest) == (shape.kinds, shape.rest)]
    # What is alike may be another training of it: what its authors advise holds for what has its name, as nf4 has.
    named = [name for name in alike if Path(name).name.lower() in Path(request.model).name.lower()]
    shape = replace(shape, advised=shapes[named[0]].advised) if named else shape
    return recommend(request, shape, load_recorded(alike[0] if alike else "", shapes))


def describe(plan: Plan) -> str:
    """A plan as text: what to type, what it takes and why, and what stands in the way."""
    figures = [f"  {what:28} {figure.text:18} {figure.reason}" for what, figure in plan.figures.items()]
    return "\n".join([*plan.lines, *figures, *filter(None, [plan.problem])])


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="REPO_OR_FOLDER", nargs="?")
    parser.add_argument("--card", type=float, help="GB of the card (default: this machine's)")
    parser.add_argument("--ram", type=float, help="GB of host memory (default: this machine's)")
    parser.add_argument("--gpu", help="which card, for times, such as 4070 (default: a usual one of its memory)")
    for key in SIZES:
        parser.add_argument(f"--{key}", type=int)
    parser.add_argument("--guidance-scale", type=float, help="1 or less: one forward in a step; Z-Image's: 0")
    parser.add_argument("--negative-prompt", help="with one, Qwen-Image has two forwards in a step")
    parser.add_argument("--check", action="store_true", help="compare what is worked out with every recorded row")
    args = parser.parse_args(arguments)
    if args.check:
        print(describe_errors())
        return
    for option in ("card", "ram", *SIZES):
        if (value := vars(args)[option]) is not None and not 0 < value < math.inf:
            parser.error(f"--{option} must be more than 0, and finite")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < math.inf:
        parser.error("--guidance-scale must be 0 or more, and finite")
    here = this_card()
    try:
        card_gb = args.card or (usual_gb(args.gpu) if args.gpu else here[1] if here else None)
        if not args.model or not card_gb:
            parser.error("give a model, and --card with the GB of the card")
        ram_gb = args.ram or round(psutil.virtual_memory().total / GB, 1)
        gpu = args.gpu or (here[0] if here and args.card is None else usual_card(card_gb))
        plan = find_plan(Request(args.model, card_gb, ram_gb, gpu, **{key: vars(args)[key] for key in OPTIONS}))
    except TutorialError as error:
        sys.exit(str(error))
    if plan.lines and not args.gpu and gpu != (here and here[0]):
        print(f"Times are those of the {gpu}: name your card with --gpu.\n")
    print(describe(replace(plan, problem="")), end="\n" if plan.lines else "")
    if plan.problem:
        sys.exit(plan.problem)


if __name__ == "__main__":
    main()

"""Measures combinations of quantization, offloading and compilation for one checkpoint, each in a process of its own.

    python -m benchmarks                                     random-flux with a GPU, else pocket-flux
    python -m benchmarks --checkpoint random-wan --steps 3
    python -m benchmarks --checkpoint stabilityai/stable-diffusion-3.5-medium --only "model offload"

The checkpoint is any text-to-image or text-to-video model of diffusers: a folder, a repository id of the Hub, or one
of the lessons' own (pocket-flux, pocket-wan, random-flux, random-wan). A combination that fails is a row that says why,
and the others go on. The results go to one JSON file, row by row: the same command goes on where it was stopped.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import models, random_checkpoints, strategies
from helpers import charts, cpu_backend, measure, quality
from helpers.checkpoints import CHECKPOINTS, PACKAGE_ROOT, Checkpoint, cache_folder, check_versions, find_fault
from helpers.errors import TutorialError

RESULTS = PACKAGE_ROOT / "benchmarks" / "results"
REFERENCE = strategies.COMBINATIONS[0]
COLUMNS = {
    "name": "", "load_s": ".1f", "first_call_s": ".1f", "latency_s": ".2f", "spread_s": ".2f", "step_ms": ".0f",
    "load_peak_gb": ".2f", "run_peak_gb": ".2f", "peak_gb": ".2f", "host_peak_gb": ".1f", "distance": ".2f",
}  # fmt: skip
SETTINGS = ("height", "width", "num_frames", "num_inference_steps")
PROMPT = "a lighthouse on a cliff in a storm"


def main() -> None:
    """Reads the command line, measures, prints a table and writes the JSON file and a chart."""
    args = parse()
    if args.list:
        print("\n".join(strategies.COMBINATIONS))
        return
    try:
        check_versions()
        cpu_backend.enable()
        run(args)
    except TutorialError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nStopped. What was measured is kept: the same command goes on from here.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "pocket-flux" if measure.accelerator().type == "cpu" else "random-flux"
    parser.add_argument("--checkpoint", default=default, help=f"folder, repository id, or name; here {default}")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="combinations that contain a TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of all combinations and stop")
    parser.add_argument("--prompt", help="what to draw")
    parser.add_argument("--height", type=at_least(1), help="pixels")
    parser.add_argument("--width", type=at_least(1), help="pixels")
    parser.add_argument("--frames", type=at_least(1), help="of a video")
    parser.add_argument("--steps", type=at_least(1), help="denoising steps")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="timed calls (3); their median counts")
    parser.add_argument("--warmups", type=at_least(0), default=0, help="calls between the first and the timed ones (0)")
    parser.add_argument("--timeout", type=at_least(1), default=1800, help="seconds for one combination (1800)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--again", action="store_true", help="measure anew what the JSON file holds already")
    return parser.parse_args()


def at_least(smallest: int) -> Callable[[str], int]:
    """A type for argparse: a whole number from `smallest` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} on")
        return int(text)

    return number


def run(args: argparse.Namespace) -> None:
    """Measures what the command line asks for.

    Raises:
        TutorialError: the checkpoint, the names or the disk are not as they must be.
    """
    names = [name for name in strategies.COMBINATIONS if any(text in name for text in args.only)]
    if not names:
        raise TutorialError(f"No combination contains {' or '.join(args.only)}: see `python -m benchmarks --list`.")
    checkpoint = choose_checkpoint(args)
    model = models.find_model(checkpoint.path)
    file = args.results / f"{checkpoint.model}-{checkpoint.size}_{slug(measure.device_name())}.json"
    print(f"{args.checkpoint}\n{models.describe(model)}\nresults: {file}\n")
    rows = read_rows(file, checkpoint, args)
    known = {row.name for row in rows}
    pictures = cache_folder() / "pictures" / file.stem
    for folder in (args.results, pictures):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TutorialError(f"{folder} cannot be written ({error.strerror}): name another folder.") from None
    for name in tqdm([name for name in names if name not in known], desc="combinations", unit="combination"):
        tqdm.write(f"{name} ...")
        row = measure_one(name, checkpoint, model, args, pictures)
        rows = sorted([*rows, row], key=lambda row: strategies.COMBINATIONS.index(row.name))
        save(rows, file)
        tqdm.write(row.failure or describe(row))
    report(rows, file)


def choose_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the command line names, with its settings; a random one is built if it is not there."""
    known = {entry.path: entry for entry in CHECKPOINTS.values()}
    entry = known.get(args.checkpoint)
    if entry is not None:
        path = entry.path
        if entry.size == "pocket":
            path = str(PACKAGE_ROOT / "checkpoints" / entry.path)
        elif entry.size == "random":
            path = str(cache_folder() / entry.path)
            if find_fault(Path(path)) is not None:
                print(f"{entry.path} is built first, once.")
                random_checkpoints.build(entry.model)
        checkpoint = replace(entry, path=path)
    else:
        checkpoint = Checkpoint(
            model=slug(Path(args.checkpoint).name),
            size="given",
            path=args.checkpoint,
            prompts=(PROMPT,),
            height=None,
            width=None,
            num_inference_steps=None,
            max_sequence_length=None,
            guidance_scale=None,
        )
    asked = {name: getattr(args, name.removeprefix("num_").replace("inference_", "")) for name in SETTINGS}
    if args.prompt:
        asked["prompts"] = (args.prompt,)
    checkpoint = replace(checkpoint, **{name: value for name, value in asked.items() if value is not None})
    parameters = models.call_parameters(checkpoint.path)
    for name, value in asked.items():
        if name in SETTINGS and value is not None and name not in parameters:
            raise TutorialError(f"{args.checkpoint} does not take {name}: leave the option out.")
    if checkpoint.num_inference_steps is None:
        checkpoint = replace(checkpoint, num_inference_steps=parameters["num_inference_steps"].default)
    return checkpoint


def read_rows(file: Path, checkpoint: Checkpoint, args: argparse.Namespace) -> list[measure.Measurement]:
    """The rows of an earlier run that still hold: same settings, same versions. Failed ones are tried again.

    Raises:
        TutorialError: the file holds rows of other settings or versions.
    """
    if args.again or not file.exists():
        return []
    try:
        rows = measure.load_measurements(file)
    except ValueError:
        raise TutorialError(f"{file} cannot be read: delete it, or use another --results folder.") from None
    now = measure.environment() | {"steps": checkpoint.num_inference_steps, "seed": checkpoint.seed}
    now |= {"repeats": args.repeats, "warmups": args.warmups}
    for name in ("height", "width"):
        if getattr(checkpoint, name) is not None:
            now[name] = getattr(checkpoint, name)
    if checkpoint.num_frames is not None:
        now["frames"] = checkpoint.num_frames
    for row in rows:
        differing = [name for name, value in now.items() if row.failure is None and getattr(row, name) != value]
        if differing:
            raise TutorialError(
                f"{file} holds results with another {differing[0]} ({getattr(row, differing[0])}, now "
                f"{now[differing[0]]}): measure anew with --again, or use another --results folder."
            )
    return [row for row in rows if row.failure is None]


def measure_one(
    name: str, checkpoint: Checkpoint, model: models.Model, args: argparse.Namespace, pictures: Path
) -> measure.Measurement:
    """The row of one combination; what goes wrong in it becomes its `failure`."""
    picture = pictures / f"{slug(name)}.png"
    try:
        if model.is_quantized() and not name.startswith("saved nf4"):
            raise TutorialError("The weights are 4-bit already: only the combinations of saved nf4 can use them.")
        if name.startswith("saved nf4"):
            model = replace(model, saved=model.path if model.is_quantized() else ensure_saved(model))
        row = measure.measure_in_fresh_process(
            "benchmarks.strategies:assemble",
            checkpoint,
            name,
            {"name": name, "model": models.as_json(asdict(model))},
            args.repeats,
            args.warmups,
            picture=picture,
            timeout_s=args.timeout,
        )
    except TutorialError as error:
        return replace(
            measure.measurement(name, checkpoint), repeats=args.repeats, warmups=args.warmups, failure=str(error)
        )
    reference = pictures / f"{slug(REFERENCE)}.png"
    if reference.exists():
        with Image.open(picture) as drawn, Image.open(reference) as wanted:
            row = replace(row, distance=round(quality.image_distance(np.asarray(drawn), np.asarray(wanted)), 4))
    return row


def ensure_saved(model: models.Model) -> str:
    """Folder of the checkpoint with nf4 weights, in the cache folder; written once, from a process of its own.

    Raises:
        TutorialError: the disk is too small, or quantizing failed.
    """
    place = Path(model.path)
    folder = cache_folder() / "saved-nf4" / slug(str(place.resolve()) if place.exists() else model.path)
    if folder.is_dir() and find_fault(folder) is None:
        return str(folder)
    part = folder.with_name(folder.name + ".part")
    for leftover in (part, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    # 4.5 bits of 16 in the quantized components, and some layers that stay as they are.
    needed = sum(size * (0.4 if name in model.quantized else 1) for name, size in model.sizes.items()) / 1e9
    free = shutil.disk_usage(part.parent).free / 1e9
    if free < needed:
        raise TutorialError(
            f"The saved nf4 weights need {needed:.1f} GB of disk and {part.parent} has {free:.1f} GB free: free some "
            "space or set TUTORIAL_CACHE to a folder on a larger disk."
        )
    try:
        job = {"model": models.as_json(asdict(model)), "folder": str(part)}
        measure.run_in_fresh_process("benchmarks.strategies:save_nf4", job)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return str(folder)


def save(rows: list[measure.Measurement], file: Path) -> None:
    """Writes the rows.

    Raises:
        TutorialError: the disk is full, or the file cannot be written.
    """
    try:
        measure.save_measurements(rows, file)
    except OSError as error:
        raise TutorialError(f"{file} cannot be written ({error.strerror}): free some space and run again.") from None


def describe(row: measure.Measurement) -> str:
    """One line of figures."""
    figures = [f"load {row.load_s:.1f} s", f"first call {row.first_call_s:.1f} s", f"latency {row.latency_s:.2f} s"]
    figures += [f"step {row.step_ms:.0f} ms"] if row.step_ms is not None else []
    figures += [f"peak {row.peak_gb:.2f} GB"] if row.peak_gb is not None else []
    return "  " + ", ".join(figures)


def report(rows: list[measure.Measurement], file: Path) -> None:
    """Prints the table of all rows and what failed, and draws the chart beside the JSON file."""
    measured = [row for row in rows if row.failure is None]
    print()
    print(charts.table(measured, COLUMNS))
    for row in rows:
        if row.failure:
            print(f"failed: {row.name}: {row.failure}")
    if measured:
        memory = "footprint_gb" if measured[0].peak_gb is None else "peak_gb"
        label = "weights (GB)" if measured[0].peak_gb is None else "memory the accelerator must have (GB)"
        title = f"{measured[0].model} ({measured[0].checkpoint_size}) on {measured[0].device}"
        chart = charts.latency_memory_chart(measured, memory=memory, memory_label=label, title=title)
        chart.savefig(file.with_suffix(".png"))
        print(f"chart: {file.with_suffix('.png')}")


def slug(text: str) -> str:
    """Letters, digits and hyphens only: for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    main()

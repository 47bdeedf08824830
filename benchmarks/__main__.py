"""Measures combinations of quantization, offloading and compilation for one checkpoint, each in a process of its own.

    python -m benchmarks                                     random-flux with a GPU, else pocket-flux
    python -m benchmarks --checkpoint random-wan --steps 3
    python -m benchmarks --checkpoint stabilityai/stable-diffusion-3.5-medium --only "model offload"

The checkpoint is any text-to-image or text-to-video model of diffusers: a folder, a repository id of the Hub, or one
by its name: pocket-flux, pocket-wan, and what benchmarks.random_checkpoints writes: random-flux, random-klein and so
on, or random-klein-nf4, which needs less disk and serves the combinations of saved nf4. A combination that fails is a
row that says why, and the others go on. `reserved_gb` is what a card must have, beside the 0.7 GB of CUDA itself; the
two peaks are what was allocated. The results go to one JSON file for each checkpoint and device, row by row: the same
command goes on where it was stopped, and tries again what failed.

Two more words are measured where a whole name has them: the start fp8, which needs torchao and a card that has float8,
and a cache with its threshold: `--only "saved nf4, resident, compiled inside, first block cache 0.1"`.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import random_checkpoints, strategies, writing
from benchmarks.families import FAMILIES
from helpers import charts, checks, cpu_backend, devices, files, models, processes, quality, records
from helpers.checkpoints import CHECKPOINTS, OTHER_CACHE, PACKAGE_ROOT, Checkpoint, cache_folder, find_pocket
from helpers.errors import TutorialError

RESULTS = PACKAGE_ROOT / "benchmarks" / "results"
REFERENCE = strategies.COMBINATIONS[0]
COLUMNS = {
    "load_s": ".1f", "first_call_s": ".1f", "latency_s": ".2f", "spread_s": ".2f", "step_ms": ".0f",
    "load_peak_gb": ".2f", "run_peak_gb": ".2f", "reserved_gb": ".2f", "host_peak_gb": ".1f", "distance": ".2f",
    "skipped": ".0%",
}  # fmt: skip
SEARCHED = (*strategies.COMBINATIONS, *strategies.VARIANTS)
NAMES = (*SEARCHED, *strategies.PEERS)
SETTINGS = ("height", "width", "num_frames", "num_inference_steps")
PROMPT = "a lighthouse on a cliff in a storm"
Image.MAX_IMAGE_PIXELS = None  # the frames of a video in a row are a large picture, and our own


def main() -> None:
    """Reads the command line, measures, prints a table and writes the JSON file and a chart."""
    args = parse()
    sys.stdout.reconfigure(line_buffering=True)  # each row shows at once in a file or a pipe, too
    if args.list:
        print("\n".join(NAMES))
        return
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)  # as Ctrl-C: it ends the other process too
    try:
        checks.check_versions()
        cpu_backend.enable()
        run(args)
    except TutorialError as error:
        sys.exit(str(error))
    except OSError as error:  # whatever else a full disk or a closed pipe stops
        sys.exit(f"Stopped by the system ({files.reason(error)}): the same command goes on from here.")
    except KeyboardInterrupt:
        sys.exit("\nStopped. What was measured is kept: the same command goes on from here.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "pocket-flux" if devices.accelerator().type == "cpu" else "random-flux"
    parser.add_argument("--checkpoint", default=default, help=f"folder, repository id, or name; here {default}")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="a whole name, any, such as 'bf16, streamed, 6.5 GB, eager'; or else all that contains a TEXT, of what "
        "--list names but fp8 and caches",
    )
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
    twice = "measure each combination twice; the second, which finds what the first compiled, goes to a file of its own"
    parser.add_argument("--warm-cache", action="store_true", help=twice)
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
        TutorialError: the checkpoint, the names or the disk are not as they must be, or a combination failed.
    """
    names = list(strategies.COMBINATIONS)
    if args.only:
        whole = [text for text in args.only if text in SEARCHED or strategies.is_combination(text)]
        parts = [text for text in args.only if text not in whole]
        names = [name for name in SEARCHED if name in whole or any(text in name for text in parts)]
        names += [text for text in dict.fromkeys(whole) if text not in SEARCHED]
    if not names:
        raise TutorialError(f"No combination contains {' or '.join(args.only)}: see `python -m benchmarks --list`.")
    files.check_writable(args.results, "name another folder with --results")
    files.check_writable(cache_folder(), OTHER_CACHE)
    checkpoint = choose_checkpoint(args)
    model = models.find_model(checkpoint.path)
    size = "" if checkpoint.size == "given" else f"-{checkpoint.size}"
    warm = "_warm-cache" if args.warm_cache else ""
    file = args.results / f"{checkpoint.model}{size}{warm}_{slug(devices.device_name())}.json"
    print(f"{args.checkpoint}\n{models.describe(model)}\nresults: {file}\n")
    rows = read_rows(file, checkpoint, names, args)
    todo = [name for name in names if name not in {row.name for row in rows}]
    pictures = cache_folder() / "pictures" / f"{file.stem}-{digest(str(file.resolve()))}"
    files.check_writable(pictures, OTHER_CACHE)
    width = max(map(len, [*names, *(row.name for row in rows)]))
    print(heading(width))
    for row in rows:
        print(line(row, width))
    saved, fault, shown = "", "", set()
    bar = tqdm(todo, unit="combination", disable=None)  # a terminal shows it, a file does not
    for name in bar:
        bar.set_description(name)
        if name.startswith("saved nf4") and not saved and not fault:
            saved, fault = ensure_saved(model)
        row = measure_one(name, checkpoint, replace(model, saved=saved), fault, args, pictures, shown)
        rows = sorted([*rows, row], key=lambda row: rank(row.name))
        rows = [compare(row, rows, pictures) for row in rows]  # all: the first combination may come later
        row = next(row for row in rows if row.name == name)
        tqdm.write(line(row, width))
        writing.save_measurements(rows, file, new=[row])
    draw_chart(rows, file)
    failed = sum(row.failure is not None for row in rows if row.name in names)
    if failed:  # so that a script can tell
        raise TutorialError(f"{failed} of {len(names)} combinations could not be measured: the table says why.")


def choose_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the command line names, with its settings; a random one is built if it is not there."""
    is_nf4 = re.fullmatch("random-.+-nf4", args.checkpoint) is not None
    entries = [*CHECKPOINTS.values(), *(family.checkpoint for family in FAMILIES.values())]
    entry = {entry.path: entry for entry in entries}.get(args.checkpoint.removesuffix("-nf4" if is_nf4 else ""))
    if entry is not None and entry.size == "pocket":
        checkpoint = replace(entry, path=find_pocket(entry.path))
    elif entry is not None and entry.size == "random":
        checkpoint = replace(entry, path=str(random_checkpoints.build(entry.model, is_nf4)))
    elif entry is not None:
        checkpoint = replace(entry, path=checks.find_on_hub(entry.path))
    else:
        checkpoint = Checkpoint(
            model=unique_name(args.checkpoint),
            size="given",
            path=models.find_given(args.checkpoint),
            prompts=(PROMPT,),
        )
    asked = {name: getattr(args, name.removeprefix("num_").replace("inference_", "")) for name in SETTINGS}
    if args.prompt:
        asked["prompts"] = (args.prompt,)
    checkpoint = replace(checkpoint, **{name: value for name, value in asked.items() if value is not None})
    parameters = models.call_parameters(checkpoint.path)
    for name, value in asked.items():
        if name in SETTINGS and value is not None and name not in parameters:
            raise TutorialError(f"{args.checkpoint} does not take {name}: leave the option out.")
    if checkpoint.num_inference_steps is None and "num_inference_steps" in parameters:
        checkpoint = replace(checkpoint, num_inference_steps=parameters["num_inference_steps"].default)
    return checkpoint


def read_rows(
    file: Path, checkpoint: Checkpoint, names: list[str], args: argparse.Namespace
) -> list[records.Measurement]:
    """The rows of an earlier run that stay: not those of `names` that failed, and with --again none of `names`.

    Raises:
        TutorialError: the file holds rows of other settings or versions.
    """
    if not file.exists():
        return []
    try:
        rows = records.load_measurements(file)
    except (OSError, ValueError, TypeError, AttributeError):
        raise TutorialError(f"{file} cannot be read: delete it, or use another --results folder.") from None
    rows = [row for row in rows if row.name not in names or (row.failure is None and not args.again)]
    own = devices.environment() | {"seed": checkpoint.seed, "repeats": args.repeats, "warmups": args.warmups}
    now = own | checkpoint.call_arguments
    for row in rows:
        then = {name: getattr(row, name) for name in own} | (row.call or {})
        differing = [name for name in now | then if now.get(name) != then.get(name)]
        if differing:
            name = differing[0]
            raise TutorialError(
                f"{file} holds results with another {name} ({then.get(name)}, now {now.get(name)}): measure all "
                "of them anew with --again, or use another --results folder."
            )
    return rows


def measure_one(
    name: str,
    checkpoint: Checkpoint,
    model: models.Model,
    fault: str,
    args: argparse.Namespace,
    pictures: Path,
    shown: set[str],
) -> records.Measurement:
    """The row of one combination; what goes wrong in it becomes its `failure`.

    `fault` says why there is no saved nf4; `shown` are the failures whose output was shown already.
    """
    (pictures / f"{slug(name)}.png").unlink(missing_ok=True)  # an earlier one must not stand for this one
    said = io.StringIO()
    try:
        if not strategies.split_cache(name)[0].endswith("eager"):
            cpu_backend.check_compiler()
        if model.is_quantized and not name.startswith("saved nf4"):
            raise TutorialError("The weights are quantized already: only the combinations of saved nf4 can use them.")
        if name.startswith("saved nf4") and fault:
            raise TutorialError(fault)
        with tempfile.TemporaryDirectory() as compiled:
            # What one combination compiled must not shorten the first call of the next.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                for _ in range(2 if args.warm_cache else 1):
                    row = processes.measure_in_fresh_process(
                        strategies.assemble,
                        checkpoint,
                        name,
                        {"name": name, "model": asdict(model), "call": checkpoint.call_arguments},
                        args.repeats,
                        args.warmups,
                        picture=pictures / f"{slug(name)}.png",
                        timeout_s=args.timeout,
                    )
                return row
    except OSError as error:
        failure = str(files.cannot_write("The folder to compile in", error, "set TMPDIR to another folder"))
    except TutorialError as error:
        failure = str(error).removeprefix(f"{name} ")  # its row begins with it
        if "see the output above" in failure and failure not in shown:
            shown.add(failure)  # the same output once
            tqdm.write(said.getvalue(), file=sys.stderr)
    return replace(records.measurement(name, checkpoint), repeats=args.repeats, warmups=args.warmups, failure=failure)


def compare(row: records.Measurement, rows: list[records.Measurement], pictures: Path) -> records.Measurement:
    """The row with the `distance` of its picture to that of the first combination, where both were drawn.

    `rows` are all. Random weights have none: they turn a difference of one bit into another picture.
    """
    if row.checkpoint_size == "random" or row.distance is not None:
        return row
    drawn = [entry.name for entry in rows if entry.failure is None]
    files = [pictures / f"{slug(name)}.png" for name in (row.name, REFERENCE)]
    if row.name not in drawn or REFERENCE not in drawn or not all(file.exists() for file in files):
        return row
    with Image.open(files[0]) as picture, Image.open(files[1]) as reference:
        return replace(row, distance=round(quality.image_distance(np.asarray(picture), np.asarray(reference)), 4))


def ensure_saved(model: models.Model) -> tuple[str, str]:
    """Folder of the checkpoint with nf4 weights, in the cache folder, and ""; or "" and why there is none.

    It is written once, from a process of its own, and anew when the files of the checkpoint have changed.
    """
    if model.is_quantized:
        return model.path, ""
    changed = max((file.stat().st_mtime_ns for file in Path(model.path).glob("*/*")), default=0)
    state = digest(f"{Path(model.path).resolve()} {model.sizes} {model.quantized} {changed}")
    folder = cache_folder() / "saved-nf4" / f"{slug(Path(model.path).name)[:80]}-{state}"
    if folder.is_dir():
        return str(folder), ""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    # 4.5 bits of 16 in the quantized components, and some layers that stay as they are.
    needed = sum(size * (0.4 if name in model.quantized else 1) for name, size in model.sizes.items())
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        files.check_space(part.parent, needed, "A checkpoint with nf4 weights", OTHER_CACHE)
        job = {"model": asdict(model), "folder": str(part)}
        processes.run_in_fresh_process(strategies.save_nf4, job)
        part.rename(folder)  # in one go: what has this name is whole
    except OSError as error:
        return "", str(files.cannot_write(folder, error, OTHER_CACHE))
    except TutorialError as error:
        return "", str(error)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return str(folder), ""


def heading(width: int) -> str:
    """The first line of the table; `width` is that of the names, in characters."""
    return "  ".join(["name".ljust(width), *COLUMNS])


def line(row: records.Measurement, width: int) -> str:
    """One line of the table."""
    if row.failure is not None:
        return f"{row.name:{width}}  failed: {row.failure}"
    figures = {column: getattr(row, column) for column in COLUMNS}
    cells = [records.MISSING if value is None else format(value, COLUMNS[name]) for name, value in figures.items()]
    return "  ".join(
        [row.name.ljust(width), *(cell.rjust(len(name)) for name, cell in zip(COLUMNS, cells, strict=True))]
    )


def draw_chart(rows: list[records.Measurement], file: Path) -> None:
    """Draws the rows that were measured, beside the JSON file.

    Raises:
        TutorialError: the disk is full, or the file cannot be written.
    """
    measured = [row for row in rows if row.failure is None]
    if not measured:
        print("Nothing was measured: there is no chart.")
        return
    title = f"{measured[0].model} ({measured[0].checkpoint_size}) on {measured[0].device}"
    chart = charts.latency_memory_bars(measured, title=title)
    try:
        chart.savefig(file.with_suffix(".png"))
    except OSError as error:
        raise files.cannot_write(file.with_suffix(".png"), error, "name another folder with --results") from None
    print(f"chart: {file.with_suffix('.png')}")


def rank(name: str) -> int:
    """Place of a combination in the table; last for one that an older version measured."""
    return NAMES.index(name) if name in NAMES else len(NAMES)


def unique_name(path: str) -> str:
    """Name of a checkpoint in file names: its repository id, or the name of its folder and which folder that is."""
    folder = Path(path)
    return f"{slug(folder.resolve().name)[:80]}-{digest(str(folder.resolve()))}" if folder.exists() else slug(path)


def digest(text: str) -> str:
    """Eight characters that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """Letters, digits and hyphens only: for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    main()

"""Runs the programs of programs/ under a limit on the memory that PyTorch may reserve.

    python -m benchmarks.programs flux --saved nf4-flux --limit 7
    python -m benchmarks.programs wan --saved nf4-wan --limit 7 --steps 2 --only "draw.py --compile"
    python -m benchmarks.programs flux --original FLUX.1-dev --limit 11.5

So a large card says what a small one can do. `--saved` is the folder of nf4 weights, from which draw.py draws;
`--original` the one that save_nf4.py quantizes, on the card and beside it. Each has a process of its own. `call_s` is
the call that draw.py draws with, or all that save_nf4.py takes. What CUDA itself takes, 0.7 to 0.8 GB on an H200, is
outside the limit. The rows go to benchmarks/results/limits_DEVICE.json. One that does not fit has what was allocated
and reserved when the memory ran out.
"""

import argparse
import datetime
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks import writing
from benchmarks.__main__ import RESULTS, slug
from helpers import checks, devices, files, measure, processes
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

PROGRAMS = PACKAGE_ROOT / "programs"
DRAWING = ("draw.py", "draw.py --compile")
SAVING = ("save_nf4.py --device cuda", "save_nf4.py --device cpu")
PROMPT = "a cat in a pool"
FILES = {"flux": "cat.png", "wan": "cat.mp4"}


def find_commands(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command lines of programs/, by what they are called in a row; they write to `folder`."""
    draw = [str(args.saved), PROMPT, "--memory-gb", str(args.limit), "--out", str(folder / FILES[args.model])]
    draw += [] if args.steps is None else ["--steps", str(args.steps)]
    save = [str(args.original), str(folder / "nf4")]
    names = (DRAWING if args.saved else ()) + (SAVING if args.original else ())
    commands = {}
    for name in names:
        program, *options = name.split()
        commands[name] = [str(PROGRAMS / program), *(draw if name in DRAWING else save), *options]
    return commands


def run_program(command: list[str], limit_gb: float) -> dict[str, Any]:
    """What one of programs/ takes, and whether it fits; runs in this process, which must be its own.

    Raises:
        TutorialError: it failed, but not for want of memory.
    """
    devices.limit_memory(limit_gb)
    kept, measure_load = [], measure.measure_load

    def measure_and_keep(function: Callable[[], Any]) -> tuple[Any, measure.Load]:
        kept.append(measure_load(function))
        return kept[0]

    try:
        with mock.patch.object(measure, "measure_load", measure_and_keep), mock.patch.object(sys, "argv", command):
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        error = stopped.__context__
        while error is not None and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            error = error.__cause__ or error.__context__
        if error is None:
            raise TutorialError(str(stopped)) from stopped
        allocated_gb = torch.cuda.max_memory_allocated() / devices.GB
        figures = {"fits": False, "allocated_gb": allocated_gb, "call_s": None, "host_peak_gb": None}
    else:
        ((said, load),) = kept
        drawn = re.search(r"drawn in ([\d.]+) s", said or "")
        figures = {"fits": True, "allocated_gb": load.load_peak_gb, "host_peak_gb": load.host_peak_gb}
        figures["call_s"] = float(drawn[1]) if drawn else load.load_s
    return figures | {"reserved_gb": devices.reserved_gb()}


def main() -> None:
    """Reads the command line, runs the programs, prints and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FILES)
    parser.add_argument("--saved", type=Path, help="folder of the saved nf4 weights, to draw from")
    parser.add_argument("--original", type=Path, help="folder of the weights in bfloat16, to save as nf4")
    parser.add_argument("--limit", type=float, required=True, help="GB that PyTorch may reserve")
    parser.add_argument("--only", help='only this program, such as "draw.py --compile"')
    parser.add_argument("--steps", type=int, help="denoising steps (the pipeline's own number)")
    parser.add_argument("--no-segments", action="store_true", help="without expandable segments")
    args = parser.parse_args()
    try:
        checks.check_versions()
        measure_programs(args)
    except TutorialError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"Stopped by the system ({files.reason(error)}). What was measured is kept.")
    except KeyboardInterrupt:
        sys.exit("\nStopped. What was measured is kept.")


def measure_programs(args: argparse.Namespace) -> None:
    """Runs what the command line asks for.

    Raises:
        TutorialError: there is no CUDA GPU, no such folder or no such program, or a program fails.
    """
    if devices.accelerator().type != "cuda":
        raise TutorialError("A limit on GPU memory needs an NVIDIA GPU, and this machine shows none.")
    if not args.saved and not args.original:
        raise TutorialError("There is nothing to run: give --saved to draw, --original to save.")
    for folder in filter(None, (args.saved, args.original)):
        fault = checks.find_fault(folder)
        if fault is not None:
            raise TutorialError(f"{folder} has no complete pipeline ({fault}): download or save it first.")
    os.environ["PYTORCH_ALLOC_CONF"] = f"expandable_segments:{not args.no_segments}"
    file = RESULTS / f"limits_{slug(devices.device_name())}.json"
    files.check_writable(RESULTS, "start this in a checkout that you can write to")
    with tempfile.TemporaryDirectory() as folder:
        runs = find_runs(args, Path(folder))
        if args.only is not None and args.only not in runs:
            raise TutorialError(f"There is no program for {args.only!r}: choose one of {', '.join(runs)}.")
        for name in tqdm([args.only] if args.only else list(runs), unit="program", disable=None):
            segments = not args.no_segments
            row = {"model": args.model, "program": name, "limit_gb": args.limit, "expandable_segments": segments}
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            rows = [other for other in rows if any(other[key] != value for key, value in row.items())]
            row |= runs[name]() | {"steps": args.steps, **devices.environment(), "date": str(datetime.date.today())}
            tqdm.write(str(row))
            writing.write_json([*rows, row], file, new=row)
            shutil.rmtree(Path(folder) / "nf4", ignore_errors=True)  # the next one writes it again


def find_runs(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict]]:
    """What the command line asks for: functions that run a program and return its figures. They write to `folder`."""
    runs = {}
    for name, command in find_commands(args, folder).items():
        arguments = {"command": command, "limit_gb": args.limit}
        runs[name] = partial(processes.run_in_fresh_process, run_program, arguments, timeout_s=7200, name=name)
    return runs


if __name__ == "__main__":
    main()

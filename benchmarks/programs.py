"""Runs the programs of lessons 2 and 3 and those of programs/, under a limit on the memory that PyTorch may reserve.

    python -m benchmarks.programs flux --saved nf4-flux --limit 7.5 --card "8 GB"
    python -m benchmarks.programs wan --saved nf4-wan --limit 7.5 --steps 2 --card draw.py
    python -m benchmarks.programs flux --original FLUX.1-dev --limit 15.5

So a large card says what a small one can do. `--saved` is the folder of nf4 weights, from which the lessons' programs
and draw.py draw; `--original` the one that save_nf4.py quantizes, on the card and beside it. Each has a process of its
own. A lesson's program draws twice, and the second call is `call_s`; for draw.py it is the call that it draws with, for
save_nf4.py all that it takes. What CUDA itself takes, 0.7 to 0.8 GB on an H200, is outside the limit. The rows go to
benchmarks/results/limits_DEVICE.json. One that does not fit has what was allocated and reserved when the memory ran
out.
"""

import argparse
import datetime
import json
import os
import re
import runpy
import shutil
import subprocess
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

LESSONS = {"flux": "02_model_cpu_offload", "wan": "03_group_offload_video"}
SAVED = {"flux": '"nf4-flux"', "wan": '"nf4-wan"'}
DRAW = {"flux": '\npipeline("', "wan": "\nprompt = "}  # how the line begins from which on a program draws
CALL = {"flux": 'California")', "wan": "num_frames=81)"}  # how its call of the pipeline ends
SEGMENTS = 'import os\n\nos.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"'
PROGRAMS = PACKAGE_ROOT / "programs"
DRAWING = ("draw.py", "draw.py --compile")
SAVING = ("save_nf4.py --device cuda", "save_nf4.py --device cpu")
PROMPT = "a cat in a pool"
FILES = {"flux": "cat.png", "wan": "cat.mp4"}
OUT_OF_MEMORY = (
    r"([\d.]+) ([MG])iB is allocated by PyTorch, and ([\d.]+) ([MG])iB is reserved by PyTorch but unallocated"
)
LIMIT = """
import torch
_total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, {limit} * 1e9 / _total))
"""
REPORT = """
import json, time
_start = time.perf_counter()
{draw}
torch.cuda.synchronize()
_allocated, _reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
_call_s = time.perf_counter() - _start
print(json.dumps({{"allocated_gb": _allocated, "reserved_gb": _reserved, "call_s": _call_s}}))
"""


def blocks(lesson: str) -> list[str]:
    """The Python programs in the text of a lesson, in order."""
    cells = json.loads((PACKAGE_ROOT / "notebooks" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def saving_programs() -> dict[str, str]:
    """The program that saves the nf4 weights, for each model."""
    return {"flux": blocks(LESSONS["flux"])[0], "wan": blocks(LESSONS["wan"])[1]}


def drawing_programs() -> dict[str, dict[str, str]]:
    """The programs that draw, put together as the lessons say: for each model, by the card they are for."""
    _, flux_8, flux_12, flux_6 = blocks(LESSONS["flux"])
    rest_stays, _, wan_8, wan_24, wan_16, wan_12 = blocks(LESSONS["wan"])
    load, compile_and_draw = _around(flux_8, "pipeline.enable_model_cpu_offload", "pipeline.transformer.compile")
    load, draw = _around(flux_8, "pipeline.enable_model_cpu_offload", 'pipeline("')
    flux = {"8 GB": flux_8, "12 GB": load + flux_12 + compile_and_draw, "6 GB": load + flux_6 + draw}
    wan_load, wan_draw = _around(wan_8, "for part in parts.values()", "prompt = ")
    others = {"24 GB": wan_24, "16 GB": wan_16, "12 GB": wan_12}
    wan = {"8 GB": wan_8} | {card: wan_load + program + wan_draw for card, program in others.items()}
    return {"flux": flux | {"the rest stays": load + rest_stays + draw}, "wan": wan}


def _around(program: str, start: str, end: str) -> tuple[str, str]:
    """What stands before the line that begins with `start`, and what from the line on that begins with `end`."""
    return program[: program.index(f"\n{start}") + 1], program[program.index(f"\n{end}") + 1 :]


def under_limit(model: str, program: str, saved: str, limit_gb: float, segments: bool, steps: int | None) -> str:
    """The program with the limit, a second call and a report of its peaks.

    `segments` keeps its line that asks the allocator for expandable segments, or puts it there.
    """
    if steps is not None:
        program = program.replace(CALL[model], f"{CALL[model][:-1]}, num_inference_steps={steps})")
    load, draw = program.split(DRAW[model])
    first = SEGMENTS if segments else ""
    load = load.replace(SEGMENTS, "").replace(SAVED[model], repr(saved))
    return first + LIMIT.format(limit=limit_gb) + load + DRAW[model] + draw + REPORT.format(draw=DRAW[model] + draw)


def run(name: str, program: str) -> dict:
    """What the program reports at its end, and whether it fits; run in an empty folder. Errors call it `name`.

    Raises:
        TutorialError: it failed, but not for want of GPU memory.
    """
    command = [sys.executable, "-c", program]
    path = os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")])  # one imports benchmarks.strategies
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": path.strip(os.pathsep)}
        process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if process.returncode == 0:
        return {"fits": True} | json.loads(process.stdout.splitlines()[-1])
    sizes = re.search(OUT_OF_MEMORY, process.stderr)
    if sizes is None:
        print(process.stderr, file=sys.stderr)
        raise TutorialError(processes.explain_failure(name, process.returncode, process.stderr))
    unit_gb = {"M": 2**20 / 1e9, "G": 2**30 / 1e9}
    allocated, unused = (float(sizes[index]) * unit_gb[sizes[index + 1]] for index in (1, 3))
    return {"fits": False, "allocated_gb": allocated, "reserved_gb": allocated + unused, "call_s": None}


def take_home_commands(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
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


def run_take_home(command: list[str], limit_gb: float) -> dict[str, Any]:
    """What one of programs/ takes, and whether it fits; runs in this process, which must be its own.

    Raises:
        TutorialError: it failed, but not for want of memory.
    """
    if devices.accelerator().type == "cuda":
        total = torch.accelerator.get_memory_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * devices.GB / total))
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
    parser.add_argument("model", choices=LESSONS)
    parser.add_argument("--saved", type=Path, help="folder of the saved nf4 weights, to draw from")
    parser.add_argument("--original", type=Path, help="folder of the weights in bfloat16, to save as nf4")
    parser.add_argument("--limit", type=float, required=True, help="GB that PyTorch may reserve")
    parser.add_argument("--card", help='only this program, such as "8 GB" or draw.py')
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
        if args.card is not None and args.card not in runs:
            raise TutorialError(f"There is no program for {args.card!r}: choose one of {', '.join(runs)}.")
        for card in tqdm([args.card] if args.card else list(runs), unit="program", disable=None):
            segments = not args.no_segments
            row = {"model": args.model, "card": card, "limit_gb": args.limit, "expandable_segments": segments}
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            rows = [other for other in rows if any(other[key] != value for key, value in row.items())]
            row |= runs[card]() | {"steps": args.steps, **devices.environment(), "date": str(datetime.date.today())}
            tqdm.write(str(row))
            writing.write_json([*rows, row], file, new=row)
            shutil.rmtree(Path(folder) / "nf4", ignore_errors=True)  # the next one writes it again


def find_runs(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict]]:
    """What the command line asks for: functions that run a program and return its figures. They write to `folder`."""
    runs = {}
    for card, program in drawing_programs()[args.model].items() if args.saved else ():
        code = under_limit(args.model, program, str(args.saved.resolve()), args.limit, not args.no_segments, args.steps)
        runs[card] = partial(run, f"The program for {card}", code)
    for name, command in take_home_commands(args, folder).items():
        arguments = {"command": command, "limit_gb": args.limit}
        runs[name] = partial(processes.run_in_fresh_process, run_take_home, arguments, timeout_s=7200, name=name)
    return runs


if __name__ == "__main__":
    main()

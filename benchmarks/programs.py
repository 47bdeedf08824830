"""Runs the programs that lessons 2 and 3 say to type, under a limit on the GPU memory that PyTorch may reserve.

    python -m benchmarks.programs flux --saved nf4-flux --limit 7.5 --card "8 GB"
    python -m benchmarks.programs wan --saved nf4-wan --limit 7.5 --steps 2

So a large card says what a small one can do. `--saved` is the folder that the lesson's saving program wrote. Each
program has a process of its own and draws twice; the second call is `call_s`. What CUDA itself takes, 0.7 to 0.8 GB on
an H200, is outside the limit. The rows go to benchmarks/results/limits_DEVICE.json. One that does not fit has what was
allocated and reserved when the memory ran out.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks import writing
from benchmarks.__main__ import RESULTS, slug
from helpers import checks, devices, files, processes
from helpers.checkpoints import PACKAGE_ROOT
from helpers.errors import TutorialError

LESSONS = {"flux": "02_model_cpu_offload", "wan": "03_group_offload_video"}
SAVED = {"flux": '"nf4-flux"', "wan": '"nf4-wan"'}
DRAW = {"flux": '\npipeline("', "wan": "\nprompt = "}  # how the line begins from which on a program draws
CALL = {"flux": 'California")', "wan": "num_frames=81)"}  # how its call of the pipeline ends
SEGMENTS = 'import os\n\nos.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"'
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


def main() -> None:
    """Reads the command line, runs the programs, prints and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=LESSONS)
    parser.add_argument("--saved", type=Path, required=True, help="folder of the saved nf4 weights")
    parser.add_argument("--limit", type=float, required=True, help="GB that PyTorch may reserve")
    parser.add_argument("--card", help='only the program for this card, such as "8 GB"')
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
    fault = checks.find_fault(args.saved)
    if fault is not None:
        raise TutorialError(
            f"{args.saved} has no complete pipeline ({fault}): run the lesson's program that saves it first."
        )
    programs = drawing_programs()[args.model]
    if args.card is not None and args.card not in programs:
        raise TutorialError(f"There is no program for {args.card!r}: choose one of {', '.join(programs)}.")
    file = RESULTS / f"limits_{slug(devices.device_name())}.json"
    files.check_writable(RESULTS, "start this in a checkout that you can write to")
    for card in tqdm([args.card] if args.card else list(programs), unit="program", disable=None):
        row = {"model": args.model, "card": card, "limit_gb": args.limit, "expandable_segments": not args.no_segments}
        program = under_limit(
            args.model, programs[card], str(args.saved.resolve()), args.limit, not args.no_segments, args.steps
        )
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        rows = [other for other in rows if any(other[key] != value for key, value in row.items())]
        row |= run(f"The program for {card}", program) | {
            "steps": args.steps,
            **devices.environment(),
            "date": str(datetime.date.today()),
        }
        tqdm.write(str(row))
        writing.write_json([*rows, row], file, new=row)


if __name__ == "__main__":
    main()

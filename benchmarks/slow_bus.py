"""Measures a slow bus on a fast one: each streamed block of a denoiser is copied once, twice and four times.

    python -m benchmarks.slow_bus nf4-flux

Two copies, one after the other, stand for a bus of half the speed: PCIe 4 in place of PCIe 5. nf4-flux is a folder of
saved nf4 weights; all of them must fit the card once. Lesson 4 compares the steps with those that it works out.
The rows go to benchmarks/results/slow-bus_DEVICE.json.
"""

import argparse
import datetime
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks import writing
from benchmarks.__main__ import RESULTS, slug
from helpers import checks, cpu_backend, devices, files, measure
from helpers.errors import TutorialError
from helpers.streaming import Parcel, Ring, stream_blocks

GB = devices.GB
COPIES = (1, 2, 4)
CALL = {"prompt": "a cat in a pool", "num_inference_steps": 10, "output_type": "latent"}


def copy_again(ring: Ring, copies: int) -> None:
    """Let each parcel be copied `copies` times into the ring, to the same place."""
    ring.copy = partial(_copy, ring, ring.copy, copies - 1)


def _copy(ring: Ring, copy: Any, again: int, parcel: Parcel) -> bool:
    if not copy(parcel):
        return False
    _, start, _ = ring.queue.pop()
    with torch.cuda.stream(ring.stream):
        for _ in range(again):
            ring.memory[start % ring.size :][: parcel.bytes].copy_(parcel.host, non_blocking=True)
        ring.queue.append((parcel, start, ring.stream and ring.stream.record_event()))
    return True


def bus_gb_s() -> float:
    """Speed of a copy of 0.2 GB from page-locked memory to the accelerator, in GB/s."""
    on_card = torch.empty(200_000_000, dtype=torch.uint8, device=devices.accelerator())
    on_host = torch.empty_like(on_card, device="cpu", pin_memory=on_card.device.type == "cuda")
    timer = Timer("on_card.copy_(on_host)", globals={"on_card": on_card, "on_host": on_host})
    return on_host.nbytes / GB / timer.blocked_autorange(min_run_time=0.5).median


def measure_steps(pipeline: DiffusionPipeline, call: dict[str, Any], budgets_gb: list[float]) -> list[dict[str, Any]]:
    """A step of the pipeline, which is on the card, for each budget and number of copies; three calls each."""

    def step_ms() -> float:
        return measure.measure_run(lambda: pipeline(**call), pipeline=pipeline).step_ms

    resident_ms, rows = step_ms(), []
    for budget_gb in tqdm(budgets_gb, unit="budget", disable=None):
        for copies in COPIES:
            streamed = stream_blocks(pipeline.transformer, budget_gb, devices.accelerator())
            copy_again(streamed.ring, copies)
            copied = sum(parcel.bytes for parcel in streamed.parcels if parcel.host is not None)
            row = {"budget_gb": budget_gb, "copies": copies, "copied_gb": copied / GB, "step_ms": step_ms()}
            streamed.remove()
            rows.append(row | {"resident_ms": resident_ms, "bus_gb_s": bus_gb_s()})
            tqdm.write(str(rows[-1]))
    return rows


def main() -> None:
    """Reads the command line, measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 2.0, 4.0], help="GB for the blocks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        checks.check_versions()
        cpu_backend.check_compiler()
        fault = checks.find_fault(args.folder)
        if fault is not None:
            raise TutorialError(f"{args.folder} has no complete pipeline ({fault}): save it with programs/save_nf4.py.")
        files.check_writable(args.results, "name another folder with --results")
        cpu_backend.enable()
        pipeline = DiffusionPipeline.from_pretrained(args.folder, dtype=torch.bfloat16, device_map="cpu")
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(devices.accelerator())
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
        rows = measure_steps(pipeline, CALL, args.budgets)
        where = {**devices.environment(), "date": str(datetime.date.today())}
        writing.write_json([row | where for row in rows], args.results / f"slow-bus_{slug(where['device'])}.json")
    except torch.OutOfMemoryError:
        sys.exit("The card must hold all weights once: measure on a larger one.")
    except (TutorialError, ValueError, MemoryError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"Stopped by the system ({files.reason(error)}).")
    except KeyboardInterrupt:
        sys.exit("\nStopped: nothing is written.")


if __name__ == "__main__":
    main()

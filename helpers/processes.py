"""A function in a process of its own, so that no memory, cache or peak of this one is in its figures."""

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL import Image

from helpers import cpu_backend, devices
from helpers.checkpoints import Checkpoint
from helpers.errors import TutorialError, describe_end
from helpers.measure import measure_load, measure_run
from helpers.records import Measurement, measurement


def run_in_fresh_process(
    function: Callable[..., Any],
    arguments: dict[str, Any] | None = None,
    timeout_s: float = 1800,
    name: str | None = None,
) -> Any:
    """Call `function` with the keyword `arguments` in a new Python process, and return what it returns.

    The function travels by cloudpickle (https://github.com/cloudpipe/cloudpickle): one that a notebook defines goes
    with the variables that it uses. Raises TutorialError if the process fails, runs out of memory or takes longer than
    `timeout_s`: it calls the function `name`, else by its own, and what the process wrote is written here.
    """
    name = name or function.__name__
    # The path comes first: what is behind it may need it to be read.
    job = pickle.dumps(sys.path) + cloudpickle.dumps((function, arguments or {}))
    try:
        with tempfile.TemporaryDirectory() as folder:
            job_file, result_file = Path(folder, "job"), Path(folder, "result")
            job_file.write_bytes(job)
            script = Path(__file__).with_name("fresh_process.py")
            command = [sys.executable, str(script), str(job_file), str(result_file), str(os.getpid())]
            process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
            if process.returncode == 0:
                return pickle.loads(result_file.read_bytes())
    except subprocess.TimeoutExpired:
        raise TutorialError(
            f"{name} did not finish in {timeout_s:.0f} s in its own process: raise the timeout, or use fewer steps."
        ) from None
    except OSError as error:
        raise TutorialError(
            f"{name} cannot have a process of its own ({error.strerror}): free some space and memory, or set TMPDIR."
        ) from None
    print(process.stdout, end="")
    print(process.stderr, end="", file=sys.stderr)
    raise TutorialError(explain_failure(name, process.returncode, process.stderr))


def measure_in_fresh_process(
    load: Callable[..., Any],
    checkpoint: Checkpoint,
    name: str,
    arguments: dict[str, Any] | None = None,
    repeats: int = 3,
    warmups: int = 0,
    picture: str | Path | None = None,
    timeout_s: float = 1800,
) -> Measurement:
    """`measure_here` in a new process, which may take `timeout_s`. Raises TutorialError as `run_in_fresh_process`."""
    job = {"load": load, "checkpoint": checkpoint, "name": name, "arguments": arguments}
    job |= {"repeats": repeats, "warmups": warmups, "picture": None if picture is None else Path(picture).absolute()}
    return run_in_fresh_process(measure_here, job, timeout_s=timeout_s, name=name)


def measure_here(
    load: Callable[..., Any],
    checkpoint: Checkpoint,
    name: str,
    arguments: dict[str, Any] | None = None,
    repeats: int = 3,
    warmups: int = 0,
    picture: str | Path | None = None,
) -> Measurement:
    """Load a pipeline with `load(**arguments)` and draw with it, all in this process; returns the measurement.

    `load` returns the pipeline, ready to be called; or the pipeline and a dictionary of arguments to call it with
    besides those of the checkpoint, of which None removes one. `repeats` and `warmups` are those of `measure_run`. With
    `picture`, a file name ending in .png, the last image is written there, a video as its frames in a row. Height,
    width and frames of the measurement are those of what was drawn. A picture that cannot be written is missing.
    """
    cpu_backend.enable()
    loaded, load_figures = measure_load(lambda: load(**(arguments or {})))
    pipeline, changes = loaded if isinstance(loaded, tuple) else (loaded, {})
    pipeline.set_progress_bar_config(disable=True)
    call = {key: value for key, value in (checkpoint.call_arguments | changes).items() if value is not None}

    def draw() -> Any:
        return pipeline(**call, generator=torch.Generator("cpu").manual_seed(checkpoint.seed))

    run = measure_run(draw, repeats=repeats, warmups=warmups, pipeline=pipeline)
    drawn = {} if call.get("output_type") == "latent" else _drawn(pipeline, run.output, picture)
    drawn["reserved_gb"] = devices.reserved_gb()
    drawn["steps"] = call.get("num_inference_steps")
    drawn["call"] = {key: value for key, value in call.items() if isinstance(value, (str, int, float))}
    return measurement(name, checkpoint, load_figures, run, pipeline, **drawn)


def _drawn(pipeline: Any, output: Any, picture: str | Path | None) -> dict[str, int | None]:
    """Height, width and frames of what a pipeline returned; the picture, or the frames in a row, go to a file."""
    kind = next((kind for kind in ("frames", "images", "image") if hasattr(output, kind)), None)
    if kind is None:
        raise TutorialError(f"{type(pipeline).__name__} returns neither images nor frames: measure another checkpoint.")
    drawn = getattr(output, kind)
    frames = drawn[0] if kind == "frames" else drawn[:1]
    if not isinstance(frames[0], Image.Image):
        frames = numpy_to_pil(np.asarray(frames))  # video pipelines return floats in 0..1
    if picture is not None:
        with contextlib.suppress(OSError):  # what was measured is worth more than the picture
            make_image_grid(frames, 1, len(frames)).save(picture)
    count = len(frames) if kind == "frames" else None
    return {"height": frames[0].height, "width": frames[0].width, "frames": count}


def explain_failure(name: str, returncode: int, stderr: str) -> str:
    """One sentence for a process that failed, by its exit status and what it wrote to stderr."""
    if returncode < 0:
        killed = returncode == -signal.SIGKILL
        advice = "close other programs or use a smaller checkpoint" if killed else "see the output above"
        return f"{name} {describe_end(returncode)}: {advice}."
    lines = [line for line in stderr.splitlines() if line.strip()] or [f"exit status {returncode}"]
    # The first line of the last error: its message may go on for many.
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    last = (errors or lines)[-1].partition(" Stack trace:")[0]  # torch's errors about CUDA graphs go on with one
    prefix = f"{TutorialError.__module__}.{TutorialError.__name__}: "
    if last.startswith(prefix):
        return last.removeprefix(prefix)
    if "OutOfMemoryError" in last or "CUDA error: out of memory" in last:
        card = devices.card()
        return f"{name} ran out of accelerator memory in its own process ({card}): use a technique that needs less."
    return f"{name} failed in its own process: {last.rstrip('.')}; see the output above."

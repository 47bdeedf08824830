"""Draw a picture or a clip with any text-to-image or text-to-video pipeline, in as much of the card as you give.

    python programs/draw.py nf4-flux "a cat in a pool" --memory-gb 7 --out cat.png

FOLDER is what save_nf4.py wrote, or any folder in diffusers format, or a repository id. `fill_card` of
helpers/streaming.py decides what stays on the card and what is streamed there, and says so.
"""

import argparse
import contextlib
import inspect
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock


def stop(*_) -> None:
    """Ctrl-C: end at once."""
    os.write(2, b"\nStopped.\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)  # now, because the imports below take seconds
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it: memory in one piece
import helpers  # before the libraries, whose known noise it quiets

helpers.quiet.show_loading_bars()
import torch
from diffusers import AutoencoderKLAllegro, DiffusionPipeline
from diffusers.utils import export_to_gif, export_to_video

from helpers import checks, cpu_backend, devices, files, measure, models
from helpers.errors import TutorialError
from helpers.models import Model
from helpers.streaming import fill_card, find_blocks

OPTIONS = {  # what pipelines call it
    "width": ("width",),
    "height": ("height",),
    "steps": ("num_inference_steps",),
    "frames": ("num_frames", "frames", "video_length"),
    "guidance_scale": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
}
FPS = 16  # Wan's


def find_call(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the call, which the pipeline must take."""
    parameters, kind = models.call_parameters(model.path), model.pipeline_class.__name__
    if more := models.find_more(model.path):
        raise TutorialError(f"{more}: give another model.")
    call = {"prompt": args.prompt, "output_type": "pil"}
    for option, names in OPTIONS.items():
        if (value := getattr(args, option)) is not None:
            name = next((name for name in names if name in parameters), None)
            if name is None:
                raise TutorialError(f"A {kind} takes no {names[0]}: leave --{option.replace('_', '-')} out.")
            call[name] = value
            if option in ("steps", "guidance_scale") and "guidance_schedule" in parameters:
                call["guidance_schedule"] = None  # Ideogram's has a scale for each of 48 steps
    return call


def find_out(out: Path | None, is_clip: bool) -> Path:
    """The file to write: it must be possible, and have a suffix of its kind."""
    kind, suffixes = ("clip", (".mp4", ".gif")) if is_clip else ("picture", (".png", ".jpg", ".jpeg", ".webp"))
    out = out or Path(kind + suffixes[0])
    if out.suffix.lower() not in suffixes:
        raise TutorialError(f"{out} is no name for a {kind}: let it end with {' or '.join(suffixes)}.")
    files.check_writable(out.parent, "give another --out")
    if out.is_dir() or (out.exists() and not os.access(out, os.W_OK)):
        raise TutorialError(f"{out} cannot be overwritten: give another --out.")
    return out


class Checked(Exception):
    """The pipeline has checked its arguments."""


def check_call(pipeline: DiffusionPipeline, call: dict[str, Any]) -> None:
    """Let a call begin, up to where the pipeline has checked its arguments: to sort the weights takes a minute.

    Raises:
        ValueError: it does not draw this.
    """
    check = getattr(pipeline, "check_inputs", None)

    def check_and_stop(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        raise Checked

    if check and "check_inputs(" in inspect.getsource(type(pipeline).__call__):
        with mock.patch.object(pipeline, "check_inputs", check_and_stop), contextlib.suppress(Checked):
            pipeline(**call)


def load(model: Model, compiled: bool) -> DiffusionPipeline:
    """The pipeline in host memory; `compiled` compiles the repeated blocks of its denoisers."""
    settings = {"variant": model.variant, "dtype": torch.bfloat16}
    if not model.pipeline_class._load_connected_pipes:  # such as Stable Cascade with its prior: diffusers refuses
        settings["device_map"] = "cpu"
    without = {name: None for name, entry in models.read_index(model.path).items() if entry == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(model.path, **settings, **without)
    if isinstance(getattr(pipeline, "vae", None), AutoencoderKLAllegro):
        pipeline.vae.enable_tiling()  # it decodes in no other way
    torch._dynamo.config.cache_size_limit = 1000
    for denoiser in (getattr(pipeline, name) for name in model.denoisers if compiled):
        for block in find_blocks(denoiser):  # one by one, and the streaming stays outside
            block.compile()
    return pipeline


def draw(args: argparse.Namespace) -> str:
    """Check, load, fill the card, draw, and write the file. Returns what it took, in words."""
    model = models.find_model(models.find_given(args.folder))
    parameters = models.call_parameters(model.path)
    call, out = find_call(model, args), find_out(args.out, is_clip=not parameters.keys().isdisjoint(OPTIONS["frames"]))
    cpu_backend.enable()  # without a card, diffusers would refuse nf4 weights
    if args.compile:
        cpu_backend.check_compiler()
    has_card = torch.cuda.is_available()
    if args.memory_gb:
        devices.limit_memory(args.memory_gb)
    print(f"Loading {args.folder} into host memory.", flush=True)
    try:
        pipeline = load(model, args.compile)
        check_call(pipeline, call)
        pipeline.set_progress_bar_config(desc="One step, to measure")
        print(fill_card(pipeline, args.memory_gb, **call), flush=True)
        pipeline.set_progress_bar_config(desc="Drawing")
        start = time.perf_counter()
        output = pipeline(**call, generator=torch.Generator().manual_seed(args.seed))
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        raise TutorialError("The card ran out of memory: draw smaller, or give more by --memory-gb.") from error
    except (MemoryError, NotImplementedError, ValueError) as error:
        raise TutorialError(str(error)) from error  # too low a limit, or a size that the model cannot draw
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError) as error:
        given = [f"--{option}" for option in ("width", "height", "steps", "frames") if getattr(args, option)]
        ways = [f"change or leave out {', '.join(given)}"] if given else []
        ways += ["draw from the model that it was before nf4"] if model.is_quantized else []
        if not ways:
            raise
        why = f"{type(error).__name__}: {error}"
        raise TutorialError(f"The model does not draw like this ({why}): {', or '.join(ways)}.") from error
    drawn = output[0][0]  # whatever it is called: the first picture or clip
    if isinstance(drawn, list):
        own = parameters.get("frame_rate") or parameters.get("fps")
        export = export_to_gif if out.suffix.lower() == ".gif" else export_to_video
        export(drawn, str(out), fps=args.fps or (int(own.default) if own else FPS))
    else:
        drawn.save(out)
    card = f", {devices.reserved_gb():.2f} GB of the card reserved" if has_card else ""
    silent = ", without its sound" if getattr(output, "audio", None) is not None else ""
    return f"{out}{silent}: drawn in {seconds:.2f} s{card}"


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, draw, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--memory-gb", type=float, help="GB that PyTorch may reserve on the card; all that is free")
    parser.add_argument("--width", type=int, help="in pixels; the pipeline's own, as all that is left out here")
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int, help="of a clip")
    parser.add_argument("--fps", type=int, help="of a clip: 16, if the pipeline does not say")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument(
        "--negative-prompt", help='what not to draw; without one, such as " ", Qwen-Image is not guided'
    )
    parser.add_argument("--seed", type=int, default=0)
    slower_first = "compile the repeated blocks: the first step takes up to a minute longer, each later one less"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=slower_first)
    parser.add_argument("--out", type=Path, help=".png, .jpg, .webp for a picture; .mp4, .gif for a clip")
    args = parser.parse_args(arguments)
    for option in ("memory_gb", "width", "height", "steps", "frames", "fps"):
        if (value := vars(args)[option]) is not None and not 0 < value < math.inf:
            parser.error(f"--{option.replace('_', '-')} must be more than 0, and finite")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < math.inf:
        parser.error("--guidance-scale must be 0 or more, and finite")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be from 0 to 9223372036854775807")
    try:
        checks.check_versions()
        drawn, took = measure.measure_load(lambda: draw(args))
    except TutorialError as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f"This model needs one more package: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"The system refused: {files.reason(error)}.")
    print(f"{drawn}, at most {took.host_peak_gb:.1f} GB of host memory.")


if __name__ == "__main__":
    main()

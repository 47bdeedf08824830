"""Which checkpoint a lesson loads: `pocket` (in this repository), `full` (from the Hub) or `random` (full-size shapes).

The environment variable TUTORIAL_MODELS chooses, and this module alone reads it. The code cells of the lessons are the
same for all three.
"""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from helpers.checks import PACKAGE_ROOT, check_versions, find_fault, find_on_hub
from helpers.errors import TutorialError

SIZES = ("pocket", "full", "random")
OTHER_CACHE = "set TUTORIAL_CACHE to another folder"  # what to do where `cache_folder` does not serve

# The prompt of the diffusers guide "Compiling and offloading quantized models".
GUIDE_PROMPT = (
    "a cinematic film still of a cat sipping a margarita in a pool in Palm Springs, California, highly detailed, "
    "high budget hollywood movie, cinemascope, moody, epic, gorgeous, film grain"
)
# The guide's video prompt, and the negative prompt that Wan's authors publish, as the guide has it in English.
GUIDE_VIDEO_PROMPT = (
    "The camera rushes from far to near in a low-angle shot, revealing a white ferret on a log. It plays, leaps into "
    "the water, and emerges, as the camera zooms in for a close-up. Water splashes berry bushes nearby, while moss, "
    "snow, and leaves blanket the ground. Birch trees and a light blue sky frame the scene, with ferns in the "
    "foreground. Side lighting casts dynamic shadows and warm highlights. Medium composition, front view, low angle, "
    "with depth of field."
)
GUIDE_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint and the settings that differ between sizes.

    `path` is a local folder or a repository id of the Hub: what `from_pretrained` takes. `prompts` are for results
    side by side, `prompt` is the first of them. Height and width are in pixels, `max_sequence_length` in tokens of the
    large text encoder. `num_frames` and `negative_prompt` are None for pictures. None leaves a setting to the pipeline.
    """

    model: str
    size: str
    path: str = field(repr=False)  # differs from machine to machine
    prompts: tuple[str, ...]
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    max_sequence_length: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    negative_prompt: str | None = None
    seed: int = 0

    @property
    def prompt(self) -> str:
        """The first of `prompts`."""
        return self.prompts[0]

    @property
    def call_arguments(self) -> dict[str, object]:
        """Keyword arguments of the pipeline's call. The seed goes apart, as a `torch.Generator`."""
        names = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
        arguments = {name: getattr(self, name) for name in (*names, "max_sequence_length")}
        return {name: value for name, value in arguments.items() if value is not None}


FULL_FLUX = Checkpoint(
    model="flux",
    size="full",
    path="black-forest-labs/FLUX.1-dev",
    prompts=(
        GUIDE_PROMPT,
        "a red fox asleep on a stack of old books, oil painting",
        "a lighthouse on a cliff in a storm, long exposure photograph",
        "a bowl of ramen on a wooden table, studio light",
    ),
    height=1024,
    width=1024,
    num_inference_steps=28,
    max_sequence_length=512,
    guidance_scale=3.5,
)

FULL_WAN = Checkpoint(
    model="wan",
    size="full",
    path="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    prompts=(GUIDE_VIDEO_PROMPT,),
    height=480,
    width=832,
    num_inference_steps=50,
    max_sequence_length=512,
    guidance_scale=5.0,
    num_frames=81,
    negative_prompt=GUIDE_NEGATIVE_PROMPT,
)

CHECKPOINTS = {
    ("flux", "pocket"): Checkpoint(
        model="flux",
        size="pocket",
        path="pocket-flux",
        prompts=(
            "cat face on a yellow background",
            "rocket on a blue background",
            "pineapple on a pink background",
            "owl on a white background",
        ),
        height=128,
        width=128,
        num_inference_steps=12,
        max_sequence_length=32,
        guidance_scale=3.5,
    ),
    ("flux", "full"): FULL_FLUX,
    ("flux", "random"): replace(FULL_FLUX, size="random", path="random-flux"),
    ("wan", "pocket"): Checkpoint(
        model="wan",
        size="pocket",
        path="pocket-wan",
        prompts=(
            "red apple moves right on a blue background",
            "rocket moves up on a black background",
            "cat face spins on a yellow background",
            "owl grows on a pink background",
        ),
        height=96,
        width=96,
        num_inference_steps=12,
        max_sequence_length=32,
        guidance_scale=3.0,
        num_frames=17,
        negative_prompt="blurry, static, noisy, dim",
    ),
    ("wan", "full"): FULL_WAN,
    # Noise after 3 steps is noise after 50; the time of a step is what one wants to know.
    ("wan", "random"): replace(FULL_WAN, size="random", path="random-wan", num_inference_steps=3),
}


def get_checkpoint(model: str) -> Checkpoint:
    """The checkpoint of `model` ("flux" or "wan") in the size that TUTORIAL_MODELS names, checked to be ready to load.

    Raises TutorialError if the library versions, the size, the model or the checkpoint itself is not as it must be.
    """
    check_versions()
    size = os.environ.get("TUTORIAL_MODELS") or "pocket"
    if size not in SIZES:
        remedy = f"set it to {' or '.join(SIZES)}, or unset it for pocket, and restart the kernel"
        raise TutorialError(f"TUTORIAL_MODELS is {size!r}: {remedy}.")
    models = sorted({repr(known) for known, _ in CHECKPOINTS})
    if repr(model) not in models:
        raise TutorialError(f"There is no model {model!r}: ask get_checkpoint for {' or '.join(models)}.")
    checkpoint = CHECKPOINTS[model, size]
    find_full = partial(find_on_hub, instead="unset TUTORIAL_MODELS to use the pocket checkpoint")
    find = {"pocket": find_pocket, "full": find_full, "random": _find_random}[size]
    return replace(checkpoint, path=find(checkpoint.path))


def find_pocket(name: str) -> str:
    """Path of `checkpoints/<name>` in the repository that this package, or the current folder, is in.

    Raises TutorialError if it is missing or incomplete.
    """
    folders = [root / "checkpoints" / name for root in (PACKAGE_ROOT, Path.cwd(), *Path.cwd().parents)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    fault = "the folder is missing" if folder is None else find_fault(folder)
    if fault is not None:
        raise TutorialError(
            f"The checkpoint checkpoints/{name} is not ready ({fault}): run the lesson inside a clone of the "
            f"repository, where `git checkout -- checkpoints/{name}` restores it."
        )
    return str(folder)


def cache_folder() -> Path:
    """Where random-weight checkpoints lie: TUTORIAL_CACHE, or ~/.cache/diffusion-tutorial."""
    return Path(os.environ.get("TUTORIAL_CACHE") or "~/.cache/diffusion-tutorial").expanduser()


def _find_random(name: str) -> str:
    """Path of the random-weight checkpoint `name` in the cache folder."""
    folder = cache_folder() / name
    fault = find_fault(folder) if folder.is_dir() else "it has not been built"
    if fault is not None:
        raise TutorialError(
            f"The checkpoint {name} is not ready in {folder.parent} ({fault}): build it once with "
            f"`python -m benchmarks.random_checkpoints {name.removeprefix('random-')}`, or unset TUTORIAL_MODELS."
        )
    return str(folder)

"""Measures how well pocket-flux draws what the prompt names, in bf16 and with nf4 weights.

    python training/evaluate_flux.py --checkpoint checkpoints/pocket-flux

Two figures, over random (name, colour) pairs seen in training and over pairs held out of it:
- name: the nearest of all emoji, by the square difference of pixels on the named background, is the named one.
- colour: the median colour of the border is nearest to the named one of all background colours.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from common import load_pipeline
from diffusers import DiffusionPipeline
from emoji import COLOURS, FONT, make_prompt, over, render_names, split_pairs
from tqdm import tqdm

from helpers import cpu_backend


def nearest_names(pictures: np.ndarray, colours: list[str], emoji: dict[str, np.ndarray]) -> list[str]:
    """Returns the name of the emoji nearest to each picture.

    Args:
        pictures: RGB in 0..255 of shape (n, height, width, 3).
        colours: name of the background of each.
        emoji: the sprites, as `render_names` returns them.
    """
    names, out = list(emoji), [""] * len(pictures)
    sprites = np.stack(list(emoji.values()))
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    for colour in sorted(set(colours)):
        known = over(sprites, COLOURS[colour]).reshape(len(names), -1) / 255
        rows = [i for i, c in enumerate(colours) if c == colour]
        # |known - picture|^2 without |picture|^2, which is the same for all emoji.
        distances = np.einsum("ij,ij->i", known, known) - 2 * flat[rows] @ known.T
        for row, nearest in zip(rows, distances.argmin(1), strict=True):
            out[row] = names[nearest]
    return out


def border_colour(picture: np.ndarray, width: int = 6) -> str:
    """Returns the name of the background colour nearest to the median of a picture's outermost pixels."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[width:-width, width:-width] = True
    median = np.median(picture[~inside], axis=0)
    return min(COLOURS, key=lambda c: np.square(np.asarray(COLOURS[c]) - median).sum())


def evaluate(
    pipeline: DiffusionPipeline,
    pairs: list[tuple[str, str]],
    emoji: dict[str, np.ndarray],
    steps: int,
    tokens: int = 32,
    batch: int = 20,
) -> dict[str, float]:
    """Draws one picture for each (name, colour) pair; returns the shares that are right, in 0..1."""
    drawn = []
    for start in tqdm(range(0, len(pairs), batch), leave=False, mininterval=5):
        part = pairs[start : start + batch]
        pictures = pipeline(
            [make_prompt(*pair) for pair in part],
            height=128,
            width=128,
            num_inference_steps=steps,
            max_sequence_length=tokens,
            generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))],
            output_type="np",
        ).images
        drawn += list(255 * pictures)
    names, colours = zip(*pairs, strict=True)
    right = {
        "name": [a == b for a, b in zip(nearest_names(np.stack(drawn), colours, emoji), names, strict=True)],
        "colour": [border_colour(picture) == colour for picture, colour in zip(drawn, colours, strict=True)],
    }
    return {key: sum(values) / len(pairs) for key, values in right.items()}


def main() -> None:
    """Prints a line for each of bf16 and nf4, training and held-out pairs, and writes them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pocket-flux")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--pairs", type=int, default=200, help="pairs in each figure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="T5 sequence length")
    parser.add_argument("--seed", type=int, default=1, help="which pairs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()

    cpu_backend.enable()
    # The names that the checkpoint was trained with, also where another version of the font would give others.
    emoji = render_names(json.loads((Path(args.checkpoint) / "names.json").read_text())["names"], 128, args.font)
    rows = []
    for nf4 in (False, True):
        pipeline = load_pipeline(args.checkpoint, nf4)
        for split, pairs in zip(("training", "held out"), split_pairs(list(emoji)), strict=True):
            pairs = random.Random(args.seed).sample(pairs, min(args.pairs, len(pairs)))
            shares = evaluate(pipeline, pairs, emoji, args.steps, args.tokens)
            rows.append({"weights": "nf4" if nf4 else "bf16", "pairs": split, "count": len(pairs), **shares})
            print("{weights}  {pairs:9} {count:4} pairs  name {name:.1%}  colour {colour:.1%}".format(**rows[-1]))
    if args.json:
        args.json.write_text(
            json.dumps({"steps": args.steps, "tokens": args.tokens, "seed": args.seed, "figures": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()

"""Measures how well pocket-wan shows what the prompt names, in bf16 and with nf4 weights.

    PYTHONPATH=. python training/evaluate_wan.py --checkpoint checkpoints/pocket-wan

Three figures, over random (name, motion, colour) triples seen in training and over triples held out of it, each
against the rendered truth of the named triple:
- motion: the path of the emoji's centre is the true one to 6 pixels and its size to 15 % (root mean squares over the
  frames); if it is to spin, the frame of a true spin nearest to each frame is the right one to 22.5 degrees (median).
- colour: the border's median colour is nearest to the named one of all background colours.
- name: the nearest of all emoji, each moved to where the clip has its own, is the named one.

Before, the same measures of the truth itself, of it after a round trip through the autoencoder, and of it with the
labels shuffled, which is chance.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from clips import FONT, FRAMES, NEGATIVE, SIZE, Clips, Triple, load_sprites, make_prompt, split_triples
from common import load_pipeline
from diffusers import AutoencoderKLWan, DiffusionPipeline
from evaluate_flux import border_colour
from tqdm import tqdm

from helpers import cpu_backend, devices

WINDOW = 56  # side of the square around an emoji that is compared, in pixels
LOOKED_AT = slice(0, FRAMES, 4)  # frames of which the emoji is recognised


def find_emoji(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the centre (n, frames, 2) and the size (n, frames) of what is not background, in pixels.

    Args:
        clips: RGB in 0..1 of shape (n, 3, frames, 96, 96).
    """
    edge = torch.ones(SIZE, SIZE, dtype=torch.bool, device=clips.device)
    edge[4:-4, 4:-4] = False
    background = clips[..., edge].flatten(2).median(2).values  # (n, 3)
    difference = (clips - background[:, :, None, None, None]).abs().amax(1)
    weight = (difference > 0.12).float()
    area = weight.sum((2, 3))
    place = torch.arange(SIZE, device=clips.device) + 0.5 - SIZE / 2
    x, y = (weight.sum(2) * place).sum(2), (weight.sum(3) * place).sum(2)
    return torch.stack([x, y], 2) / area.clamp(min=1)[..., None], area.sqrt()


def cut_out(clips: torch.Tensor) -> torch.Tensor:
    """Returns the square around the emoji in each frame, of shape (n, frames, 3, WINDOW, WINDOW)."""
    centres = find_emoji(clips)[0]
    corner = (centres.round().long() + (SIZE - WINDOW) // 2).clamp(0, SIZE - WINDOW)
    step = torch.arange(WINDOW, device=clips.device)
    rows, columns = corner[..., 1, None] + step, corner[..., 0, None] + step  # (n, frames, WINDOW)
    frames = clips.transpose(1, 2)  # (n, frames, 3, 96, 96)
    frames = frames.gather(3, rows[:, :, None, :, None].expand(-1, -1, 3, -1, SIZE))
    return frames.gather(4, columns[:, :, None, None, :].expand(-1, -1, 3, WINDOW, -1))


def check_motion(clip: torch.Tensor, truth: torch.Tensor, spins: bool) -> bool:
    """Whether the motion in a clip is that of the truth, both of shape (3, 17, 96, 96); see the module's text."""
    centres, sizes = find_emoji(torch.stack([clip, truth]))
    path = (centres[0] - centres[1]).square().sum(1).mean().sqrt()
    size = (sizes[0].clamp(min=1) / sizes[1]).log().square().mean().sqrt()
    if path > 6 or size > 0.15:
        return False
    if not spins:
        return True
    shown, turned = cut_out(torch.stack([clip, truth]))
    turned = turned[:-1]  # the last is the first again
    nearest = torch.cdist(shown.flatten(1), turned.flatten(1)).argmin(1)
    wrong = (nearest - torch.arange(FRAMES, device=clip.device)) % len(turned)
    return bool(wrong.minimum(len(turned) - wrong).median() <= 1)


def recognise(clip: torch.Tensor, triple: torch.Tensor, clips: Clips) -> int:
    """Returns the index of the emoji that a clip of shape (3, 17, 96, 96) shows, given its motion and colour."""
    candidates = triple.repeat(len(clips.names), 1)
    candidates[:, 0] = torch.arange(len(candidates), device=triple.device)
    known = cut_out(clips.draw(candidates, frames=LOOKED_AT)).flatten(1)
    shown = cut_out(clip[None, :, LOOKED_AT]).flatten(1)
    return int((known - shown).square().sum(1).argmin())


@torch.no_grad()
def measure(shown: torch.Tensor, triples: list[Triple], clips: Clips) -> dict[str, float]:
    """Returns the shares of clips, 0..1 of shape (n, 3, 17, 96, 96), that are right by motion, colour and name."""
    right = {"motion": [], "colour": [], "name": []}
    rows = clips.index(triples)
    for clip, row, (name, motion, colour) in zip(shown, rows, triples, strict=True):
        clip = clip.to(clips.device)
        right["motion"].append(check_motion(clip, clips.draw(row[None])[0], motion == "spins"))
        picture = 255 * clip.median(1).values.permute(1, 2, 0).cpu().numpy()
        right["colour"].append(border_colour(picture) == colour)
        right["name"].append(clips.names[recognise(clip, row, clips)] == name)
    return {key: float(np.mean(values)) for key, values in right.items()}


def make_clips(
    pipeline: DiffusionPipeline, triples: list[Triple], arguments: dict, batch: int = 25, negative: str = NEGATIVE
) -> torch.Tensor:
    """Makes a clip for each triple; returns them in 0..1, of shape (n, 3, 17, 96, 96)."""
    out = []
    for start in tqdm(range(0, len(triples), batch), leave=False, mininterval=5):
        part = triples[start : start + batch]
        frames = pipeline(
            [make_prompt(*triple) for triple in part],
            negative_prompt=[negative] * len(part),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))],
            output_type="pt",
            **arguments,
        ).frames
        out.append(frames.transpose(1, 2).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Returns clips in 0..1 after a round trip through the autoencoder."""
    out = []
    for part in clips.split(25):
        latents = vae.encode((2 * part - 1).to(vae.device, vae.dtype)).latent_dist.mean
        out.append(vae.decode(latents).sample.float().cpu() / 2 + 0.5)
    return torch.cat(out)


def main() -> None:
    """Prints a line for each measurement and writes them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pocket-wan")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--triples", type=int, default=100, help="triples in each figure")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=32, help="text sequence length")
    parser.add_argument("--seed", type=int, default=1, help="which triples")
    parser.add_argument("--only", choices=["bf16", "nf4"], help="one kind of weights")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()

    cpu_backend.enable()
    sprites = load_sprites(args.font)
    names = json.loads((Path(args.checkpoint) / "names.json").read_text())["names"]
    clips = Clips({name: sprites[name] for name in names}, devices.accelerator())
    chosen = {
        split: random.Random(args.seed).sample(triples, min(args.triples, len(triples)))
        for split, triples in zip(("training", "held out"), split_triples(names), strict=True)
    }
    rows = []

    def report(weights: str, split: str, shown: torch.Tensor, triples: list[Triple]) -> None:
        shares = measure(shown, triples, clips)
        rows.append({"weights": weights, "triples": split, "count": len(triples), **shares})
        line = "{weights:12} {triples:9} {count:4} triples  motion {motion:.1%}  colour {colour:.1%}  name {name:.1%}"
        print(line.format(**rows[-1]), flush=True)

    arguments = {
        "num_inference_steps": args.steps, "guidance_scale": args.guidance, "max_sequence_length": args.tokens
    }  # fmt: skip
    for weights in ["bf16", "nf4"] if args.only is None else [args.only]:
        pipeline = load_pipeline(args.checkpoint, weights == "nf4")
        if not rows:
            held_out = chosen["held out"]
            truth = torch.cat([clips.draw(row[None]).cpu() for row in clips.index(held_out)])
            report("truth", "held out", truth, held_out)
            report("autoencoder", "held out", reconstruct(pipeline.vae, truth), held_out)
            shuffled = random.Random(args.seed).sample(held_out, len(held_out))
            report("shuffled", "held out", truth, shuffled)
        for split, triples in chosen.items():
            report(weights, split, make_clips(pipeline, triples, arguments), triples)
    if args.json:
        args.json.write_text(json.dumps({**arguments, "seed": args.seed, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

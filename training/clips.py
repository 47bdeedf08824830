"""The training data of pocket-wan: emoji that move over plain colours, in clips of 17 frames of 96 x 96 pixels.

The glyphs are those of Noto Color Emoji, as in `emoji.py`, with a thin white outline, so that each is seen on each
background. A clip is named by a triple, for example ("red apple", "moves right", "blue").
"""

import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji import COLOURS, FONT, load_sheet, make_article, render_glyph
from PIL import Image, ImageFilter

SIZE, FRAMES = 96, 17  # of a clip, in pixels and frames
TEXTURE = 96  # side of a sprite, in texels
LONGEST = 80  # longest side of a glyph, in texels; the rest is outline and margin
SIDE, SMALL, LARGE = 38, 20, 44  # longest side of a sprite in a clip, in pixels: as a rule, and at most and least
TRAVEL = 22  # how far from the centre a path starts and ends, in pixels

# Everyday name: Unicode name. Left out is what looks alike when turned.
NAMES = {
    "red apple": "red apple",
    "green apple": "green apple",
    "pineapple": "pineapple",
    "strawberry": "strawberry",
    "cherries": "cherries",
    "banana": "banana",
    "grapes": "grapes",
    "watermelon": "watermelon",
    "pear": "pear",
    "carrot": "carrot",
    "mushroom": "mushroom",
    "avocado": "avocado",
    "eggplant": "aubergine",
    "pizza": "slice of pizza",
    "hamburger": "hamburger",
    "french fries": "french fries",
    "ice cream": "soft ice cream",
    "birthday cake": "birthday cake",
    "coffee": "hot beverage",
    "cat face": "cat face",
    "dog face": "dog face",
    "lion face": "lion face",
    "tiger face": "tiger face",
    "bear face": "bear face",
    "panda face": "panda face",
    "rabbit face": "rabbit face",
    "fox face": "fox face",
    "monkey face": "monkey face",
    "pig face": "pig face",
    "frog face": "frog face",
    "unicorn face": "unicorn face",
    "owl": "owl",
    "penguin": "penguin",
    "duck": "duck",
    "chick": "baby chick",
    "elephant": "elephant",
    "horse": "horse",
    "cow": "cow",
    "turtle": "turtle",
    "dinosaur": "sauropod",
    "fish": "fish",
    "whale": "spouting whale",
    "octopus": "octopus",
    "crab": "crab",
    "snail": "snail",
    "bee": "honeybee",
    "butterfly": "butterfly",
    "rocket": "rocket",
    "car": "automobile",
    "bus": "bus",
    "fire engine": "fire engine",
    "tractor": "tractor",
    "airplane": "airplane",
    "sailboat": "sailboat",
    "robot face": "robot face",
    "ghost": "ghost",
    "alien": "extraterrestrial alien",
    "skull": "skull",
    "pumpkin": "jack-o-lantern",
    "tree": "deciduous tree",
    "christmas tree": "christmas tree",
    "palm tree": "palm tree",
    "cactus": "cactus",
    "tulip": "tulip",
    "rose": "rose",
    "balloon": "balloon",
    "gift": "wrapped present",
    "heart": "heavy black heart",
    "star": "white medium star",
    "soccer ball": "soccer ball",
    "guitar": "guitar",
    "trophy": "trophy",
    "crown": "crown",
    "umbrella": "umbrella",
    "bell": "bell",
    "house": "house building",
    "teddy bear": "teddy bear",
    "camera": "camera",
    "fire": "fire",
    "smiley": "grinning face",
}

MOTIONS = {
    "moves left": ("moves to the left", "moving left"),
    "moves right": ("moves to the right", "moving right"),
    "moves up": ("goes up", "moving up"),
    "moves down": ("goes down", "moving down"),
    "spins": ("rotates", "spinning"),  # one turn, clockwise
    "grows": ("gets bigger", "growing"),
    "shrinks": ("gets smaller", "shrinking"),
}
"""Motions by name, each with other words for it."""

FORMS = (
    "{name} {motion} on {a_colour} background",
    "{a_name} {motion} on {a_colour} background",
    "the {name} {motion} on {a_colour} background",
    "{a_name} {motion} on {colour}",
    "{name} {motion}, {colour} background",
    "{colour} background, {name} {motion}",
    "a video of {a_name} that {motion} on {a_colour} background",
    "{name} {motion}",  # the colour is the model's choice
)
"""Forms of a prompt seen in training; the first is the one that the lessons use."""

FAULTS = {
    "blurry": ("blurry", "blurred"),
    "static": ("static", "still"),
    "noisy": ("noisy", "grainy"),
    "dim": ("dim", "dark"),
}
"""What a clip of low quality can have, each with the words for it."""

NEGATIVE = "blurry, static, noisy, dim"
"""The negative prompt of the lessons."""

Triple = tuple[str, str, str]


def make_prompt(name: str, motion: str, colour: str, form: str = FORMS[0]) -> str:
    """Returns the prompt for one clip, for example "red apple moves right on a blue background"."""
    names = {"name": name, "a_name": make_article(name), "colour": colour, "a_colour": make_article(colour)}
    return form.format(motion=motion, **names)


def vary_prompt(triple: Triple, generator: random.Random) -> str:
    """Returns a prompt for a triple in a random form, with other words here and there ("cat" for "cat face")."""
    name, motion, colour = triple
    if generator.random() < 0.4:
        name = name.removesuffix(" face")
    motion = generator.choice((motion, motion, *MOTIONS[motion]))
    return make_prompt(name, motion, colour, generator.choice(FORMS))


def name_faults(faults: list[str], generator: random.Random) -> str:
    """Returns a prompt that names the given faults, in random order and words, for example "dim, blurred"."""
    words = [generator.choice((fault, *FAULTS[fault])) for fault in faults]
    generator.shuffle(words)
    if generator.random() < 0.3:
        words.append(generator.choice(("low quality", "worst quality")))
    return ", ".join(words)


def split_triples(names: list[str], seed: int = 0) -> tuple[list[Triple], list[Triple]]:
    """Splits all (name, motion, colour) triples into 90% for training and 10% held out; returns both."""
    triples = [(name, motion, colour) for name in names for motion in MOTIONS for colour in COLOURS]
    random.Random(seed).shuffle(triples)
    cut = len(triples) // 10
    return triples[cut:], triples[:cut]


def render_sprite(character: str, font: Path = FONT) -> np.ndarray:
    """Draws one emoji with a white outline, its longest side LONGEST texels, as RGBA of shape (96, 96, 4)."""
    glyph = Image.fromarray(render_glyph(character, 160, font))
    glyph = glyph.crop(glyph.getbbox())
    scale = LONGEST / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.LANCZOS)
    out = Image.new("RGBA", (TEXTURE, TEXTURE), (255, 255, 255, 0))
    out.paste(glyph, ((TEXTURE - glyph.width) // 2, (TEXTURE - glyph.height) // 2))
    outline = out.getchannel("A").filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(1))
    white = Image.new("RGBA", out.size, (255, 255, 255, 255))
    white.putalpha(outline)
    return np.asarray(Image.alpha_composite(white, out))


def load_sprites(font: Path = FONT) -> dict[str, np.ndarray]:
    """Returns name to sprite for all names; see `render_sprite`."""
    return {name: render_sprite(unicodedata.lookup(known), font) for name, known in NAMES.items()}


def plan_motions() -> torch.Tensor:
    """Returns shape (motions, frames, 4): centre x and y in pixels from the middle, longest side in pixels, angle."""
    t, still = torch.linspace(0, 1, FRAMES), torch.zeros(FRAMES)
    side, path, size = still + SIDE, TRAVEL * (2 * t - 1), SMALL + (LARGE - SMALL) * t
    plans = {
        "moves left": (-path, still, side, still),
        "moves right": (path, still, side, still),
        "moves up": (still, -path, side, still),
        "moves down": (still, path, side, still),
        "spins": (still, still, side, 2 * torch.pi * t),
        "grows": (still, still, size, still),
        "shrinks": (still, still, size.flip(0), still),
    }
    return torch.stack([torch.stack(plans[motion], 1) for motion in MOTIONS])


class Clips:
    """Draws clips on the device, for triples of indices: of a name in `sprites`, of a motion and of a colour."""

    def __init__(self, sprites: dict[str, np.ndarray], device: torch.device) -> None:
        self.device, self.names = device, list(sprites)
        rgba = torch.stack([torch.from_numpy(s.copy()) for s in sprites.values()]).to(device).float() / 255
        rgba = rgba.permute(0, 3, 1, 2)
        self.sprites = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        self.backgrounds = torch.tensor(list(COLOURS.values()), device=device).float() / 255
        self.plans = plan_motions().to(device)

    def index(self, triples: list[Triple]) -> torch.Tensor:
        """Returns the indices of triples, of shape (n, 3)."""
        names = {name: i for i, name in enumerate(self.names)}
        motions, colours = list(MOTIONS), list(COLOURS)
        rows = [(names[n], motions.index(m), colours.index(c)) for n, m, c in triples]
        return torch.tensor(rows, device=self.device)

    def draw(
        self,
        triples: torch.Tensor,
        generator: torch.Generator | None = None,
        liveliness: torch.Tensor | None = None,
        frames: slice = slice(None),
    ) -> torch.Tensor:
        """Draws clips in 0..1 of shape (n, 3, 17, 96, 96).

        Args:
            triples: indices of shape (n, 3).
            generator: for small shifts and scales (2 pixels, 4 %); without it, the rendered truth of the triples.
            liveliness: how much each moves, in 0..1, of shape (n,); 1 if not given.
            frames: which of the 17 frames.
        """
        n, (name, motion, colour) = len(triples), triples.unbind(1)
        plan = self.plans[motion]
        if liveliness is not None:
            rest = plan.mean(1, keepdim=True)
            rest[..., 3] = 0
            plan = torch.lerp(rest, plan, liveliness[:, None, None])
        plan = plan[:, frames]
        if generator is not None:
            noise = 2 * torch.rand(n, 1, 3, device=self.device, generator=generator) - 1
            plan = plan + F.pad(2 * noise[..., :2], (0, 2))
            plan = torch.cat([plan[..., :2], plan[..., 2:3] * (1 + 0.04 * noise[..., 2:]), plan[..., 3:]], 2)
        x, y, side, angle = plan.flatten(0, 1).unbind(1)
        # Maps a place in the clip to one in the sprite: both are -1..1 over 96 pixels or texels.
        zoom, cos, sin = LONGEST / side, angle.cos(), angle.sin()
        turn = zoom[:, None, None] * torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
        shift = -turn @ torch.stack([x, y], 1)[..., None] / (SIZE / 2)
        count = plan.shape[1]
        grid = F.affine_grid(torch.cat([turn, shift], 2), (n * count, 4, 2 * SIZE, 2 * SIZE), align_corners=False)
        sprites = self.sprites[name].repeat_interleave(count, 0)
        drawn = F.avg_pool2d(F.grid_sample(sprites, grid, align_corners=False), 2)  # drawn at twice the size: no jags
        background = self.backgrounds[colour].repeat_interleave(count, 0)[:, :, None, None]
        clips = drawn[:, :3] + background * (1 - drawn[:, 3:])
        return clips.unflatten(0, (n, count)).transpose(1, 2).clamp(0, 1)


def spoil(
    clips: torch.Tensor, blur: torch.Tensor, noise: torch.Tensor, dim: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Makes clips in 0..1 worse, each fault by a strength in 0..1 of shape (n,). "static" is `draw`'s to do."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    soft = frames
    for _ in range(3):
        soft = F.avg_pool2d(soft, 7, 1, 3, count_include_pad=False)
    soft = soft.unflatten(0, (len(clips), -1)).transpose(1, 2)
    clips = torch.lerp(clips, soft, blur[:, None, None, None, None])
    half = (*clips.shape[:3], SIZE // 2, SIZE // 2)
    grain = torch.randn(half, device=clips.device, generator=generator)
    grain = grain.repeat_interleave(2, 3).repeat_interleave(2, 4)
    clips = clips * (1 - 0.6 * dim[:, None, None, None, None])
    return (clips + 0.12 * noise[:, None, None, None, None] * grain).clamp(0, 1)


def read_sheet(path: Path) -> dict[str, np.ndarray]:
    """Reads the sprites that `python training/clips.py` wrote: name to RGBA of shape (96, 96, 4). Needs no font."""
    return load_sheet(path, list(NAMES), TEXTURE)


def main(path: str, columns: int = 10) -> None:
    """Writes all sprites, in order, `columns` in a row, as one picture with transparency; the tests read it."""
    sprites = list(load_sprites().values())
    sheet = Image.new("RGBA", (columns * TEXTURE, -(-len(sprites) // columns) * TEXTURE))
    for i, sprite in enumerate(sprites):
        sheet.paste(Image.fromarray(sprite), (i % columns * TEXTURE, i // columns * TEXTURE))
    sheet.save(path, quality=80, method=6)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python training/clips.py FILE.webp")
    main(sys.argv[1])

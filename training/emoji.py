"""The training data of the pocket checkpoints: colour emoji over plain backgrounds.

The glyphs are those of Noto Color Emoji (Debian package `fonts-noto-color-emoji`, SIL Open Font License 1.1).
Each is named by its Unicode name in lower case, for example "cat face" or "green apple".
"""

import random
import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

COLOURS = {
    "white": (250, 250, 250),
    "black": (24, 24, 24),
    "gray": (140, 140, 140),
    "red": (205, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 70),
    "green": (60, 160, 75),
    "blue": (50, 100, 215),
    "purple": (125, 65, 170),
    "pink": (250, 170, 200),
}
"""Background colours by name, as RGB in 0..255."""

# Left out: variants (skin tones, hair, tags), flags, glyphs that are text rather than a picture, and families of
# near-copies (24 clock faces, office buildings, people). Plain coloured shapes would vanish on a background of
# their own colour.
_LEFT_OUT = re.compile(
    r"^tag |modifier|component|regional|flag|clock face|circle|square|diamond|heart$|symbol|sign$|button"
    r"|input |idiograph|ideograph|triangle|arrow|ligature|keycap|moon|with face|^no |prohibited|squared"
    r"|speech bubble|thought balloon|anger bubble|index|oncoming|mobile phone|customs|baggage|luggage|passport|closet"
    r"|restroom|office|hotel|hospital|bank|school$|store|tram car|railway car|page |calendar|notebook|older|pregnant"
    r"|person |woman|women|^man |family|bust|police|fist|globe|mountain cable|tearing|teller|cancellation|of worship"
    r"|feeding|silhouette of|people|station|light rail|kiss$"
)

# Unicode 15's emoji have no name in Python 3.11: left out, so that every Python makes the same set.
_UNICODE_15 = {
    0x1F6DC, 0x1FA75, 0x1FA76, 0x1FA77, 0x1FA87, 0x1FA88, 0x1FAAD, 0x1FAAE, 0x1FAAF, 0x1FABB, 0x1FABC, 0x1FABD,
    0x1FABF, 0x1FACE, 0x1FACF, 0x1FADA, 0x1FADB, 0x1FAE8, 0x1FAF7, 0x1FAF8,
}  # fmt: skip

TEMPLATES = (
    "{name} on {a_colour} background",
    "{name} on {a_colour} background",
    "{name} on {a_colour} background",
    "{name} on {a_colour} background",
    "{a_name} on {a_colour} background",
    "{a_name} on {a_colour} background",
    "a picture of {a_name} on {a_colour} background",
    "{a_name} on {colour}",
    "{name}, {colour} background",
    "{colour} background, {name}",
    "{name}",  # the colour is the model's choice
)
"""Prompt forms seen in training; the first is the one that the lessons use."""


def make_article(words: str) -> str:
    """Returns the words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def make_prompt(name: str, colour: str, template: str = TEMPLATES[0]) -> str:
    """Returns the prompt for one emoji on one background, for example "cat face on a yellow background"."""
    return template.format(name=name, a_name=make_article(name), colour=colour, a_colour=make_article(colour))


def render_glyph(character: str, size: int, font: Path = FONT) -> np.ndarray:
    """Draws one emoji, centred, as RGBA.

    Args:
        character: the emoji.
        size: side of the square, in pixels; the emoji fills three quarters of it.
        font: Noto Color Emoji, with bitmaps of 136 x 128 pixels.

    Returns:
        uint8 array of shape (size, size, 4).

    Raises:
        SystemExit: if the font is not installed.
    """
    if not Path(font).exists():
        raise SystemExit(f"The font {font} is missing: install it with `apt install fonts-noto-color-emoji`.")
    # 109 is the only size for which the font holds bitmaps.
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text(
        (80, 80), character, font=ImageFont.truetype(str(font), 109), embedded_color=True, anchor="mm"
    )
    box = canvas.getbbox()
    if box is None:
        return np.zeros((size, size, 4), np.uint8)
    # Centre what is drawn, keep the size that the font gives it relative to the others.
    glyph = canvas.crop(box)
    scale = 0.75 * size / 136
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.LANCZOS)
    out = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    out.paste(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return np.asarray(out)


def over(sprite: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Puts an RGBA sprite over a plain colour; returns float32 RGB in 0..255, of the sprite's shape."""
    alpha = sprite[..., 3:].astype(np.float32) / 255
    return sprite[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)


@cache
def load_emoji(size: int = 128, font: Path = FONT, distance: float = 27.0) -> dict[str, np.ndarray]:
    """Returns the data set: name to RGBA sprite of shape (size, size, 4).

    Candidates are the single code points from U+1F300 on that the font draws, without the kinds named in
    `_LEFT_OUT`. One that looks like an earlier one (root mean square difference under `distance` levels of 255, on
    gray, at 32 pixels) is dropped, so that a name means a picture.
    """
    names, sprites, small = [], [], []
    for code in range(0x1F300, 0x1FB00):
        name = unicodedata.name(chr(code), "").lower()
        if not name or code in _UNICODE_15 or _LEFT_OUT.search(name):
            continue
        sprite = render_glyph(chr(code), size, font)
        opaque = (sprite[..., 3] > 128).mean()
        if opaque < 0.06:  # not in the font, or a thin outline
            continue
        thumb = np.asarray(Image.fromarray(sprite).resize((32, 32), Image.BOX))
        thumb = over(thumb, COLOURS["gray"])
        if small and np.sqrt(((np.stack(small) - thumb) ** 2).mean(axis=(1, 2, 3))).min() < distance:
            continue
        names.append(name)
        sprites.append(sprite)
        small.append(thumb)
    return dict(zip(names, sprites, strict=True))


def render_names(names: list[str], size: int = 128, font: Path = FONT) -> dict[str, np.ndarray]:
    """Returns name to RGBA sprite for the given names, for example those in a checkpoint's `names.json`."""
    return {name: render_glyph(unicodedata.lookup(name), size, font) for name in names}


def split_pairs(names: list[str], seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Splits all (name, colour) pairs into 90% for training and 10% held out; returns (training, held_out)."""
    pairs = [(name, colour) for name in names for colour in COLOURS]
    random.Random(seed).shuffle(pairs)
    cut = len(pairs) // 10
    return pairs[cut:], pairs[:cut]


def load_sheet(path: Path, names: list[str], size: int = 48) -> dict[str, np.ndarray]:
    """Reads what `python training/emoji.py` wrote: name to RGBA sprite of shape (size, size, 4). Needs no font."""
    sheet = np.asarray(Image.open(path).convert("RGBA"))
    columns = sheet.shape[1] // size
    corners = ((i // columns * size, i % columns * size) for i in range(len(names)))
    return {name: sheet[y : y + size, x : x + size] for name, (y, x) in zip(names, corners, strict=True)}


def main(path: str, size: int = 48, columns: int = 26) -> None:
    """Writes all emoji, in order, `columns` in a row, as one picture with transparency; the tests read it."""
    sprites = list(load_emoji().values())
    sheet = Image.new("RGBA", (columns * size, -(-len(sprites) // columns) * size))
    for i, sprite in enumerate(sprites):
        small = Image.fromarray(sprite).resize((size, size), Image.BOX)
        sheet.paste(small, (i % columns * size, i // columns * size))
    sheet.save(path, quality=80, method=6)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python training/emoji.py FILE.webp")
    main(sys.argv[1])

"""How far what `helpers.predict` works out is from what was recorded, for every row of a GPU."""

import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import records
from helpers.cards import find_card
from helpers.predict import REPOSITORIES, RESULTS, Call, Prediction, load_rows, predict, shape_of_row
from helpers.shapes import Part

WANTED = {"memory": 0.1, "time": 0.25}  # how far off a figure may be
CAVEATS = """\
The factors were fitted to these same rows, except those of the RTX 4090: this shows how well a few factors describe the
rows, not how well they foretell a new one. Fitted to all models but one, they meet all streamed figures of that one,
decoding aside; but the formulas were written with all in view.
How new models were foretold, before anything was mended or fitted to them. klein and Z-Image, by what was fitted to
FLUX.1 and Wan2.1: 76 of 94 figures of memory and 23 of 48 of time. With two mistakes mended that were no matter of fit
(a step of Z-Image-Turbo as it is called has one forward, not two; no file is larger than the part that it holds), 79
and 40; of these, streamed: 29 of 32 and 14 of 16. Qwen-Image and Wan2.2, by what was then mended: 18 of 26 and 13 of
14; streamed: 8 of 12 and 6 of 6. Three of these eight misses were a change of the program, which took less host memory;
three were Qwen-Image's decoding, which takes more than twice what was worked out.
Of five rows that came after the last fit (FLUX in bf16 streamed, Qwen-Image's recipe 3, three of Wan2.2): 18 of 20 and
8 of 10. The bf16 weights that are streamed, 253 ms a step, were foretold to 1%.
What streaming reserves is nearly its limit, whatever the model. Decoding has three factors, each fitted to one model:
for pictures, for one picture of a VAE made for videos, and for clips. The first was met by klein and Z-Image, whose
VAEs are as wide as FLUX.1's; Wan2.2 has Wan2.1's VAE, and nothing checks the others. With the clip's factor FLUX would
need half as much again at least, with the picture's Wan a third less and Qwen-Image half.
Not foretold: what group offload with a stream reserves of saved weights (2.4 to 6.9 GB more than is worked out, perhaps
because Python runs ahead of the card) and how long its hooks hold up a step; how fast a host copies in model offload
(0.3 to 1 s for a GB); the host memory of Z-Image, about a file more than the others', and of a resident Wan, 2 GB more.
Two rows of an H100 loaded FLUX from files of 6.7 GB: files are of 1 GB now."""

NAMES = {"recipe 1": "nf4, resident, full compile", "recipe 2": "nf4, model offload, full compile"}
NAMES |= {"recipe 3": "nf4, leaf, full compile", "quantization": "nf4, resident, eager"}
NAMES |= {"quantization, torch.compile": "nf4, resident, full compile"}
NAMES |= {"quantization, torch.compile, model CPU offloading": "nf4, model offload, full compile"}
WHOLE_FILES = "2026-11-28"  # earlier rows loaded nf4 weights that had one file for each component
PLACED = re.compile(r"resident|text encoders offloaded|model offload|leaf|block|streamed, (?P<limit>[\d.]+) GB")


def predict_row(row: records.Measurement) -> Prediction | None:
    """What is worked out for a recorded row; None if its name says no way to place weights, or has fp8 or a cache."""
    name = NAMES.get(row.name, row.name)
    placed = PLACED.search(name)
    if not placed or row.failure or name.startswith("fp8") or "cache" in name:
        return None
    shape = shape_of_row(row)
    alone = (row.call or {}).get("output_type") == "latent"  # the transformer alone, loaded in host memory
    if alone:
        shape = replace(shape, encoders=[], vae=Part(0, 0), vae_channels=0, largest=shape.blocks)
    call = Call(row.height or 1024, row.width or 1024, row.frames or 1, row.steps or 28)
    placement = placed[0] if placed["limit"] is None else "streamed"
    starts = [start for start in ("saved nf4", "bf16") if name.startswith(start)]
    start = starts[0] if starts else "saved nf4" if alone else "nf4"
    hidden = "with record_stream" in name or "stream, record_stream" in name or "with the rest" in name
    _, card = find_card(row.device)
    whole, limit = (row.date or "") < WHOLE_FILES, float(placed["limit"] or 0)
    return predict(shape, card, call, placement, limit, "compile" in name, start, hidden, whole)


def errors(folder: Path = RESULTS, models: Container[str] = tuple(REPOSITORIES)) -> list[dict[str, Any]]:
    """Each figure of memory and time of every recorded row of a GPU, and how far what is worked out is off."""
    found = []
    for file in sorted(folder.glob("*.json")):
        for row in load_rows(file):
            if row.model not in models or row.checkpoint_size == "pocket" or (made := predict_row(row)) is None:
                continue
            for figure in ("load_peak_gb", "run_peak_gb", "reserved_gb", "host_peak_gb", "step_ms", "latency_s"):
                recorded, expected = getattr(row, figure), getattr(made, figure)
                if recorded and (row.source is None or figure == "latency_s"):
                    wanted = WANTED["memory" if figure.endswith("_gb") else "time"]
                    off = expected / recorded - 1
                    found.append({"file": file.stem, "name": row.name, "figure": figure, "recorded": recorded})
                    found[-1] |= {"worked out": expected, "off": off, "hit": abs(off) <= wanted}
    return found


def describe_errors() -> str:
    """How far what is worked out is from what was recorded, with every miss."""
    found = errors()
    lines = [f"{len(found)} recorded figures.", CAVEATS]
    for kind, wanted in WANTED.items():
        part = [error for error in found if error["figure"].endswith("_gb") == (kind == "memory")]
        hits = sum(error["hit"] for error in part)
        lines.append(f"{kind}: {hits} of {len(part)} within {wanted:.0%}. Misses:")
        for error in part:
            if not error["hit"]:
                figures = f"{error['recorded']:.4g} recorded, {error['worked out']:.4g} worked out, {error['off']:+.0%}"
                lines.append(f"  {error['file']}: {error['name']}: {error['figure']}: {figures}")
    return "\n".join(lines)


def summarize_errors() -> list[dict[str, Any]]:
    """How many recorded figures are met, for what `draw.py` does and for other ways: a line for each."""
    found, lines = errors(), []
    for way, is_streamed in (("streamed, as draw.py does", True), ("any other", False)):
        part = [error for error in found if ("streamed" in error["name"]) == is_streamed]
        for kind, wanted in WANTED.items():
            hits = [error["hit"] for error in part if error["figure"].endswith("_gb") == (kind == "memory")]
            lines.append({"way": way, "figures": f"of {kind}", "recorded": len(hits)})
            lines[-1] |= {"wanted within": f"{wanted:.0%}", "met": sum(hits)}
    return lines

"""Recomputes the figures in the prose of README.md and of the lessons. `tests/prose_figures.toml` says how.

For each document it has two lists of pieces of its text, each on one line, whatever the line breaks in the document:

- `recorded`: each figure is an expression in braces, over the recorded results, with the format in which it is printed:
  `'{flux["recipe 2"].first_call_s:.0f} s for the first call'`. `NAMES` are the names that it may use.
- `given`: the figures were not recorded in a file. They are sizes of models and cards, worked out in the same sentence,
  estimated, or what others published.

A figure is a number with a unit, a decimal fraction, or a number that is compared ("in place of 18"). Each must be in a
piece of one of the two lists, and each piece in the document.
"""

import json
import re
import string
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from notebook_checks import NOTEBOOKS, ROOT, text_cells, without_code

from helpers import activity, records
from helpers.predict import SAVE

RESULTS = ROOT / "benchmarks" / "results"
PIECES = tomllib.loads((Path(__file__).parent / "prose_figures.toml").read_text(encoding="utf-8"))
EVERYWHERE = PIECES["every document"]["given"]
WORDS = {
    2: "half",
    3: "a third",
    4: "a quarter",
    5: "a fifth",
    6: "a sixth",
    7: "a seventh",
    8: "an eighth",
    9: "a ninth",
}

HOW = ("eager", "regional compile")

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
UNIT = r"(?:%|(?:s|ms|min|minutes?|seconds?|hours?|[GM]B(?:/s)?|[TGP]flop(?:/s)?|levels?|times|million|billion)\b)"
# Not the 1 of FLUX.1, the 2.1 of Wan2.1 or the 4.0 of PCIe 4.0.
FIGURE = re.compile(
    rf"(?<![\w.,])(?<!PCIe )(?:{NUMBER}(?=[ -]?{UNIT})|\d+\.\d+(?!\.?\w)"
    rf"|(?<=in place of ){NUMBER}|(?<=instead of ){NUMBER}|(?<=against ){NUMBER}"
    rf"|{NUMBER}(?=,? (?:to|and|or|against|in place of|instead of) {NUMBER}[ -]?{UNIT}))"
)
PACKAGE = re.compile(r"(?:diffusers|transformers|bitsandbytes|torch|Python|Apache-) ?\d+(?:\.\d+)+")


def rows(file: str) -> dict[str, records.Measurement]:
    """The rows of a file of measurements, by name."""
    return {row.name: row for row in records.load_measurements(RESULTS / f"{file}.json")}


def fraction(value: float) -> str:
    """The nearest of a half, a third, a quarter, ... in words."""
    return WORDS[min(WORDS, key=lambda count: abs(1 / count - value))]


def groups(measured: dict[str, records.Measurement]) -> list[records.Measurement]:
    """The rows of group offload."""
    return [row for name, row in measured.items() if "group offload" in name or name == "recipe 3"]


def offloading(measured: dict[str, records.Measurement]) -> list[float]:
    """Seconds that model offload adds to a call with nf4 weights: each of its rows less the resident one beside it."""
    pairs = {
        f"{start}, model offload, {how}": f"{start}, resident, {how}" for start in ("nf4", "saved nf4") for how in HOW
    }
    pairs["recipe 2"] = "nf4, resident, full compile"
    return [measured[a].latency_s - measured[b].latency_s for a, b in pairs.items() if a in measured]


def break_even(row: records.Measurement, other: records.Measurement) -> int:
    """From how many calls on `row` takes less time in all than `other`: counted, one call after the other."""
    seconds, others = row.first_call_s, other.first_call_s
    calls = 1
    while seconds > others:
        seconds, others, calls = seconds + row.latency_s, others + other.latency_s, calls + 1
    return calls


def end_ms(events: list[activity.Activity]) -> float:
    """When the last piece of work ends."""
    return max(event.end_ms for event in events)


def waits_ms(events: list[activity.Activity]) -> float:
    """How long nothing is computed."""
    return end_ms(events) - activity.busy_ms(events, "compute")


def tried(model: str, card: str, segments: bool, fits: bool) -> dict[str, Any]:
    """The row of a program that was tried under a limit; the one with the lowest limit, if there are several."""
    wanted = {"model": model, "program": card, "expandable_segments": segments, "fits": fits}
    found = [row for row in NAMES["limits"] if wanted.items() <= row.items()]
    return min(found, key=lambda row: row["limit_gb"])


def limit(model: str, card: str) -> float:
    """The lowest limit under which the program for a card ran."""
    return min(
        row["limit_gb"] for row in NAMES["limits"] if (row["model"], row["program"], row["fits"]) == (model, card, True)
    )


LIMITS = json.loads((RESULTS / "limits_nvidia-h200.json").read_text())
NAMES: dict[str, Any] = {
    "flux": rows("flux-random_nvidia-h200"),
    "flux_streamed": rows("flux-random_streamed_nvidia-h200"),
    "flux_host": rows("flux-random_host-memory_nvidia-h200"),
    "flux_h100": rows("flux-random_nvidia-h100-80gb-hbm3"),
    "flux_warm": rows("flux-random_warm-cache_nvidia-h100-80gb-hbm3"),
    "flux_settings": rows("flux-random_settings_nvidia-h200"),
    "starts": rows("flux-random_starts_nvidia-h200"),
    "flux_pocket": rows("flux-pocket_amd-epyc-2-threads"),
    "wan": rows("wan-random_nvidia-h200"),
    "wan_h100": rows("wan-random_nvidia-h100-80gb-hbm3"),
    "wan_settings": rows("wan-random_settings_nvidia-h200"),
    "lesson_3": rows("wan-random_lesson-3_nvidia-h200"),
    "pocket_settings": rows("wan-pocket_settings_nvidia-h200"),
    "limits": LIMITS,
    "saving": next(row for row in LIMITS if row["program"] == SAVE),
    "slow_bus": json.loads((RESULTS / "slow-bus_nvidia-h100-80gb-hbm3.json").read_text()),
    "copies": {row["copy"]: row for row in json.loads((RESULTS / "copies_nvidia-h200.json").read_text())},
    "flux_activity": activity.load_activities(RESULTS / "flux-random_activity_nvidia-h200.json"),
    "wan_activity": activity.load_activities(RESULTS / "wan-random_activity_nvidia-h200.json"),
    "activity": activity,
    "cited": list(rows("flux-full_rtx-4090_cited").values()),
}
NAMES |= {entry.__name__: entry for entry in (fraction, groups, offloading, break_even, end_ms, waits_ms, tried, limit)}


def texts(document: str) -> list[str]:
    """The prose of README.md or of a notebook, a text for each cell: no code, no targets of links, one blank for many.

    The tables of README.md under "What was measured" are left out: test_consistency.py compares each of their cells.
    """
    if document == "README.md":
        prose = (ROOT / document).read_text(encoding="utf-8")
        cells = [re.sub(r"^\|.*\(s\).*\n(?:\|.*\n)+", "", prose, flags=re.MULTILINE)]
    else:
        cells = [cell.source for _, cell in text_cells(nbformat.read(NOTEBOOKS / document, as_version=4))]
    plain = [re.sub(r"<code>.*?</code>|<[^>]*>|(?<=\])\([^)]*\)", " ", without_code(text)) for text in cells]
    return [" ".join(PACKAGE.sub("", text).split()) for text in plain]


def problems(document: str, cells: list[str]) -> list[str]:
    """What is wrong with the figures in the texts of a document, a sentence for each."""
    found = []
    covered = [set() for _ in cells]
    for piece, required in [
        *((piece, True) for piece in sum(PIECES[document].values(), [])),
        *((piece, False) for piece in EVERYWHERE),
    ]:
        matches = [
            (index, match) for index, cell in enumerate(cells) for match in pattern(document, piece).finditer(cell)
        ]
        if required and not matches:
            found.append(
                f"{document} has no such text any more: {piece!r}. Change it in prose_figures.toml, or remove it."
            )
        for index, match in matches:
            covered[index].update(range(*match.span()))
            for text, (expression, form) in zip(match.groups(), expressions(document, piece), strict=True):
                value = format(eval(expression, dict(NAMES)), form)
                if text != value:
                    where = sentence(cells[index], match)
                    found.append(f"{document}: {where!r} says {text}, recorded is {value} ({expression}).")
    for index, cell in enumerate(cells):
        for match in FIGURE.finditer(cell):
            if match.start() not in covered[index]:
                where = sentence(cell, match)
                found.append(
                    f"{document}: where does {match.group()!r} come from? Add a line to prose_figures.toml: {where!r}"
                )
    return found


def expressions(document: str, piece: str) -> list[tuple[str, str]]:
    """The expressions in a recorded piece, each with its format; none in a given one."""
    parts = string.Formatter().parse(piece) if piece in PIECES[document]["recorded"] else []
    return [(expression, form) for _, expression, form, _ in parts if expression is not None]


def pattern(document: str, piece: str) -> re.Pattern:
    """What finds a piece in a text, whatever its figures are."""
    if piece not in PIECES[document]["recorded"]:
        return re.compile(rf"(?<![\w.]){re.escape(piece)}" if piece[0].isalnum() else re.escape(piece))
    parts = string.Formatter().parse(piece)
    field = rf"((?<![\d.]){NUMBER}(?!\.?\d)|half|an? \w+)"
    return re.compile("".join(re.escape(text) + (field if name is not None else "") for text, name, *_ in parts))


def sentence(text: str, match: re.Match) -> str:
    """The sentence around a match, or the cell of a table."""
    start = max(text.rfind(mark, 0, match.start()) for mark in (". ", "| ", "* ", ": ")) + 1
    end = re.search(r"[.;:] | \||$", text[match.end() :]).start() + match.end()
    return text[start:end].strip()

"""Plots of the lessons. Each plot function returns a closed matplotlib figure: a notebook shows it once.

The colours are the high-contrast ones of Paul Tol, which colour-blind readers can tell apart, and which stay apart in
grey print (https://personal.sron.nl/~pault/). With more things than colours each has its name beside it.
"""

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from helpers.activity import KINDS, Activity
from helpers.records import Measurement, decimals, value
from helpers.residency import Residency

COLOURS = ("#004488", "#BB5566", "#DDAA33", "#000000")
LABELS = {
    "reserved_gb": "memory reserved (GB)",
    "peak_gb": "memory allocated (GB)",
    "host_peak_gb": "host memory (GB)",
}
STYLE = {"axes.titlelocation": "left", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}


@contextlib.contextmanager
def _drawing(rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes, as from `plt.subplots`, in the style of the lessons; closed at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, layout="constrained", **settings)
        yield figure, axes
    plt.close(figure)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _all_reserved(measurements: Sequence[Measurement]) -> bool:
    return all(entry.reserved_gb is not None for entry in measurements)


def _short(number: float) -> str:
    return f"{number:.{decimals(number)}f}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names on the left, the first one on top, and lines to read the values by."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)


def latency_memory_chart(
    measurements: Sequence[Measurement],
    memory: str | None = None,
    title: str = "",
    memory_label: str | None = None,
) -> Figure:
    """Latency (seconds, up) against memory (GB, right), one named point for each measurement; lower left is best.

    `memory` is a field of `Measurement`; without one "reserved_gb", which the card must have, or "peak_gb" where a
    measurement is older than that, with a label that says which. On a CPU, which has neither, take "footprint_mb" or
    "host_peak_gb". Raises ValueError if a measurement lacks one of the two figures.
    """
    if memory is None:
        memory = "reserved_gb" if _all_reserved(measurements) else "peak_gb"
    if memory_label is None:
        memory_label = LABELS.get(memory, memory)
    points = [(entry.latency_s, value(entry, memory), entry.name) for entry in measurements]
    for *figures, name in points:
        if None in figures:
            raise ValueError(f"{name!r} has no latency_s or no {memory}")
    top, right = max(y for y, _, _ in points), max(x for _, x, _ in points)
    with _drawing(figsize=(7, 4.5)) as (figure, axes):
        height = -top
        for index, (y, x, name) in enumerate(sorted(points)):
            axes.scatter(x, y, s=70, color=_colour(index), zorder=3)
            # The names are a column beside the axes: each at the height of its point, or above the one below.
            height = max(y, height + 0.08 * top)
            line = {"arrowstyle": "-", "color": _colour(index), "lw": 0.7, "shrinkB": 5, "relpos": (0, 0.5)}
            place = {"xytext": (1.03, height), "textcoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate(name, (x, y), arrowprops=line, **place)
        # Both axes from zero, so that distances are honest.
        axes.set(xlabel=memory_label, ylabel="latency of one call (s)", title=title)
        axes.set(xlim=(0, 1.1 * right), ylim=(0, height + 0.15 * top))
        axes.grid(alpha=0.3)
    return figure


def reserved_chart(measurements: Sequence[Measurement]) -> Figure:
    """A step and a call against the memory reserved, for each way to place saved nf4 weights; other rows are left out.

    A row of the benchmark is named "saved nf4, WAY, COMPILATION". Those that are streamed are joined by a line: the
    more memory they have, the less they copy.
    """
    names = [(re.fullmatch("saved nf4, (.*), .*?", row.name), row) for row in measurements]
    ways = {match[1]: row for match, row in names if match}
    streamed = sorted((row for way, row in ways.items() if "streamed" in way), key=lambda row: row.reserved_gb)
    others = {way: row for way, row in ways.items() if "streamed" not in way}
    with _drawing(1, 2, figsize=(10, 4), sharex=True) as (figure, panels):
        for axes, field, label in zip(panels, ("step_ms", "latency_s"), ("step (ms)", "call (s)"), strict=True):
            line = [[getattr(row, name) for row in streamed] for name in ("reserved_gb", field)]
            axes.plot(*line, "o-", color="black", label="streamed (fill_card)")
            for index, (way, row) in enumerate(others.items()):
                axes.plot(row.reserved_gb, getattr(row, field), "Dsv^"[index % 4], color=_colour(index), label=way)
            top = max(getattr(row, field) for row in ways.values())
            axes.set(xlabel="memory reserved (GB)", ylabel=label, ylim=(0, 1.1 * top), xlim=(0, None))
            axes.grid(alpha=0.3)
        panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def latency_memory_bars(
    measurements: Sequence[Measurement], figure: str = "latency_s", title: str = "", memory_format: str = "{:.1f}"
) -> Figure:
    """One row for each measurement: a bar for its time, and one for the memory reserved, which the card must have.

    `figure` is "latency_s" or "step_ms"; `memory_format` is for the labels of the bars on the right. Where a
    measurement is older than `reserved_gb`, two thin bars show the allocated peaks instead, loading and running;
    without an accelerator one shows the host's. Good for many measurements; `latency_memory_chart` shows the trade
    between the two for a few. Raises ValueError if there are no measurements, or one lacks the figure.
    """
    if not measurements or any(getattr(entry, figure) is None for entry in measurements):
        raise ValueError(f"latency_memory_bars needs measurements that all have {figure}")
    label = {"latency_s": "latency of one call (s)", "step_ms": "one denoising step (ms)"}[figure]
    on_card = any(entry.peak_gb is not None for entry in measurements)
    peaks = {"load_peak_gb": "while loading", "run_peak_gb": "while running"} if on_card else {"host_peak_gb": "host"}
    if _all_reserved(measurements):
        peaks = {"reserved_gb": "reserved"}
    rows, height = np.arange(len(measurements)), 0.7 / len(peaks)
    size = (10, 0.34 * len(measurements) + 1.5)
    with _drawing(1, 2, figsize=size, sharey=True) as (drawing, (left, right)):
        left.barh(rows, [getattr(entry, figure) for entry in measurements], height=0.6, color=COLOURS[0])
        for index, (peak, name) in enumerate(peaks.items(), start=1):
            place = rows + height * (index - (len(peaks) + 1) / 2)
            values = [getattr(entry, peak) or 0.0 for entry in measurements]
            right.barh(place, values, height=height, color=_colour(index), label=name)
        for axes, settings in ((left, {"fmt": _short}), (right, {"fmt": memory_format, "fontsize": 8})):
            for bars in axes.containers:
                axes.bar_label(bars, padding=3, **settings)
            _name_rows(axes, [entry.name for entry in measurements])
            axes.margins(x=0.15)
        left.set(xlabel=label, title=title)
        right.set(xlabel=LABELS[next(iter(peaks)) if len(peaks) == 1 else "peak_gb"])
        if len(peaks) > 1:
            drawing.legend(loc="outside lower right", ncols=2, fontsize=9, frameon=False)  # over no bar
    return drawing


def image_grid(
    images: Sequence[Sequence[Image.Image | np.ndarray]],
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    size: float = 1.8,
) -> Figure:
    """Pictures in rows and columns, `size` inches each, with a title over each column and before each row.

    Arrays are of shape (height, width, 3), integers in 0..255 or floats in 0..1.
    """
    columns = max(len(row) for row in images)
    inches = (size * columns, size * len(images) + 0.3)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    with _drawing(len(images), columns, figsize=inches, squeeze=False, subplot_kw=bare) as (figure, axes):
        for row, line in zip(axes, images, strict=True):
            for axis, image in zip(row, line, strict=False):
                axis.imshow(np.asarray(image))
        for axis, text in zip(axes[0], titles, strict=False):
            # Ten letters of this size to an inch: long titles break into lines and do not run into their neighbours.
            axis.set_title(textwrap.fill(text, round(10 * size)), loc="center", fontsize=10)
        for axis, text in zip(axes[:, 0], row_titles, strict=False):
            axis.set_ylabel(text, fontsize=10)
    return figure


def weight_histogram(weights: Mapping[str, Any], title: str = "", bins: int = 200) -> Figure:
    """One histogram over another of the values of some weights (tensors or arrays of any shape), on one scale.

    For instance {"bf16": before, "nf4, read back": after}: in one block of 64 weights nf4 leaves at most 16 values.
    """
    # NumPy has no bfloat16.
    arrays = [torch.as_tensor(weight).detach().float().cpu().flatten().numpy() for weight in weights.values()]
    edge = max(float(np.abs(array).max()) for array in arrays) * 1.02 or 1.0
    size = (7, 1.8 * len(arrays) + 0.4)
    with _drawing(len(arrays), figsize=size, sharex=True, squeeze=False) as (figure, axes):
        for index, (axis, name, array) in enumerate(zip(axes[:, 0], weights, arrays, strict=True)):
            axis.hist(array, bins=bins, range=(-edge, edge), color=_colour(index))
            axis.set_ylabel(name)
        axes[0, 0].set_title(title)
        axes[-1, 0].set_xlabel("value of the weight")
    return figure


def residency_timeline(events: Sequence[Residency], title: str = "", unit: str = "GB") -> Figure:
    """When each component was on the accelerator: a row for each, a bar for each stay, labelled with its bytes.

    `unit` is "GB" or "MB" (1e9 or 1e6 bytes). Raises ValueError if there are no events, or the unit is another.
    """
    if not events or unit not in ("GB", "MB"):
        raise ValueError('residency_timeline needs events, and "GB" or "MB" as the unit')
    scale = {"GB": 1e9, "MB": 1e6}[unit]
    names = list(dict.fromkeys(event.component for event in events))
    rows = [names.index(event.component) for event in events]
    colours = {name: _colour(index) for index, name in enumerate(sorted(names))}  # the same whatever the order
    end = max(event.offload_s for event in events)
    # A very short stay is still a visible line.
    lengths = [max(event.offload_s - event.onload_s, end / 400) for event in events]
    with _drawing(figsize=(8, 0.55 * len(names) + 1.3)) as (figure, axes):
        starts = [event.onload_s for event in events]
        bars = axes.barh(rows, lengths, left=starts, height=0.5, color=[colours[event.component] for event in events])
        axes.bar_label(bars, [f"{_short(event.bytes / scale)} {unit}" for event in events], padding=3, fontsize=9)
        _name_rows(axes, names)
        axes.set(xlabel="time since the call began (s)", title=title, xlim=(0, 1.15 * end))  # room for the last label
    return figure


def activity_timeline(
    recordings: Mapping[str, Sequence[Activity]], start_ms: float, end_ms: float, title: str = ""
) -> Figure:
    """What the accelerator did between two moments: for each recording a lane of copies there, compute and copies back.

    Where a copy lies over compute it costs no time; where it lies over a gap, the accelerator waits for it. Raises
    ValueError if there are no recordings.
    """
    if not recordings:
        raise ValueError("activity_timeline needs recordings")
    rows: list[str] = []
    height = 0.28 * (len(KINDS) + 1) * len(recordings) + 1.3
    with _drawing(figsize=(9, height)) as (figure, axes):
        for name, entries in recordings.items():
            axes.text(start_ms, len(rows), name, weight="bold", va="center")
            rows.append("")  # the line of the name, above the lanes
            for index, kind in enumerate(KINDS):
                spans = [(entry.start_ms, entry.end_ms - entry.start_ms) for entry in entries if entry.kind == kind]
                axes.broken_barh(spans, (len(rows) - 0.4, 0.8), color=_colour(index), lw=0)
                rows.append(kind)
        _name_rows(axes, rows)
        axes.set(xlabel="time (ms)", title=title, xlim=(start_ms, end_ms))
    return figure

"""Plots of the lessons. Each plot function returns a closed matplotlib figure: a notebook shows it once.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/).
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

from helpers.activity import KINDS, Activity
from helpers.records import MISSING as MISSING  # benchmarks prints it
from helpers.records import Measurement, decimals, value
from helpers.residency import Residency

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
}


def latency_memory_chart(
    measurements: Sequence[Measurement],
    memory: str = "peak_gb",
    title: str = "",
    memory_label: str = "memory the accelerator must have (GB)",
) -> Figure:
    """Latency (seconds, up) against memory (GB, right), one labelled point for each measurement; lower left is best.

    `memory` is a field of `Measurement`: on a CPU, where "peak_gb" is None, take "footprint_mb" or "host_peak_gb".

    Raises:
        ValueError: a measurement lacks one of the two figures.
    """
    points = [(entry.name, value(entry, memory), entry.latency_s) for entry in measurements]
    for name, *figures in points:
        if None in figures:
            raise ValueError(f"{name!r} has no latency_s or no {memory}")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for index, (_, x, y) in enumerate(points):
            axes.scatter(x, y, s=70, color=COLOURS[index % len(COLOURS)], zorder=3)
        axes.set(xlabel=memory_label, ylabel="latency of one call (s)", title=title)
        # Room on the right for the labels, and both axes from zero, so that distances are honest.
        axes.set_xlim(0, 1.45 * max(x for _, x, _ in points))
        axes.set_ylim(0, 1.15 * max(y for _, _, y in points))
        axes.grid(alpha=0.3)
        _label_points(axes, points)
    plt.close(figure)
    return figure


def latency_memory_bars(measurements: Sequence[Measurement], figure: str = "latency_s", title: str = "") -> Figure:
    """One row for each measurement: a bar for its time, and two thin ones for its load peak and its run peak.

    `figure` is "latency_s" or "step_ms". Without an accelerator the right panel shows the host's peak. Good for many
    measurements; `latency_memory_chart` shows the trade between the two for a few.

    Raises:
        ValueError: there are no measurements, or one lacks the figure.
    """
    if not measurements or any(getattr(entry, figure) is None for entry in measurements):
        raise ValueError(f"latency_memory_bars needs measurements that all have {figure}")
    label = {"latency_s": "latency of one call (s)", "step_ms": "one denoising step (ms)"}[figure]
    on_card = any(entry.peak_gb is not None for entry in measurements)
    peaks = {"load_peak_gb": "while loading", "run_peak_gb": "while running"} if on_card else {"host_peak_gb": "host"}
    rows = np.arange(len(measurements))
    with plt.rc_context(STYLE):
        drawing, (left, right) = plt.subplots(
            1, 2, figsize=(10, 0.34 * len(measurements) + 1.5), sharey=True, layout="constrained"
        )
        bars = left.barh(rows, [getattr(entry, figure) for entry in measurements], height=0.6, color=COLOURS[0])
        left.bar_label(bars, [_short(getattr(entry, figure)) for entry in measurements], padding=3)
        for index, (peak, name) in enumerate(peaks.items()):
            values = [getattr(entry, peak) or 0.0 for entry in measurements]
            height = 0.7 / len(peaks)
            shift = (index - (len(peaks) - 1) / 2) * height
            bars = right.barh(rows + shift, values, height=height, color=COLOURS[1 + index], label=name)
            right.bar_label(bars, [f"{peak:.1f}" for peak in values], padding=3, fontsize=8)
        left.set_yticks(rows, [entry.name for entry in measurements])
        left.set_ylim(len(measurements) - 0.4, -0.6)  # first row on top
        left.set(xlabel=label, title=title)
        right.set(xlabel="accelerator memory (GB)" if on_card else "host memory (GB)")
        if on_card:
            drawing.legend(loc="outside lower right", ncols=2, fontsize=9, frameon=False)  # over no bar
        for axes in (left, right):
            axes.margins(x=0.15)
            axes.grid(axis="x", alpha=0.3)
    plt.close(drawing)
    return drawing


def _short(number: float) -> str:
    return f"{number:.{decimals(number)}f}"


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point, higher or lower where it would lie on a point or on another name."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that boxes can be compared
    inside = axes.get_window_extent()
    radius = 7
    taken = []
    for _, x, y in points:
        left, bottom = axes.transData.transform((x, y)) - radius
        taken.append(Bbox.from_bounds(left, bottom, 2 * radius, 2 * radius))
    heights = [0, *(sign * step for step in range(14, 200, 7) for sign in (1, -1))]
    places = [(side, height) for height in heights for side in ("left", "right")]
    for index, (name, x, y) in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        label = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 5},
        )
        label.set_in_layout(False)
        for side, height in places:
            label.set(ha=side, position=(10 if side == "left" else -10, height))
            box = _words_box(label)
            if inside.containsx(box.x0) and inside.containsx(box.x1) and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                if not any(box.overlaps(other) for other in taken):
                    break
        label.arrow_patch.set_visible(height != 0)
        taken.append(box)


def _words_box(label: Annotation) -> Bbox:
    """The box of an annotation without its line."""
    label.update_positions(label.axes.figure.canvas.get_renderer())
    return Text.get_window_extent(label)


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
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(images),
            columns,
            figsize=(size * columns, size * len(images) + 0.3),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for row, line in enumerate(images):
            for column, image in enumerate(line):
                axes[row, column].imshow(np.asarray(image))
        for axis, text in zip(axes[0], titles, strict=False):
            # Ten letters of this size to an inch: long titles break into lines and do not run into their neighbours.
            axis.set_title(textwrap.fill(text, round(10 * size)), loc="center", fontsize=10)
        for axis, text in zip(axes[:, 0], row_titles, strict=False):
            axis.set_ylabel(text, fontsize=10)
    plt.close(figure)
    return figure


def weight_histogram(weights: Mapping[str, Any], title: str = "", bins: int = 200) -> Figure:
    """One histogram over another of the values of some weights (tensors or arrays of any shape), on one scale.

    For instance {"bf16": before, "nf4, read back": after}: in one block of 64 weights nf4 leaves at most 16 values.
    """
    arrays = {name: np.asarray(_as_float(weight)).ravel() for name, weight in weights.items()}
    edge = max(float(np.abs(array).max()) for array in arrays.values()) * 1.02 or 1.0
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(arrays), 1, figsize=(7, 1.8 * len(arrays) + 0.4), sharex=True, squeeze=False, layout="constrained"
        )
        for index, (axis, (name, array)) in enumerate(zip(axes[:, 0], arrays.items(), strict=True)):
            axis.hist(array, bins=bins, range=(-edge, edge), color=COLOURS[index % len(COLOURS)])
            axis.set_ylabel(name)
        axes[0, 0].set_title(title)
        axes[-1, 0].set_xlabel("value of the weight")
    plt.close(figure)
    return figure


def _as_float(weight: Any) -> Any:
    # NumPy has no bfloat16.
    return weight.detach().float().cpu().numpy() if hasattr(weight, "detach") else weight


def residency_timeline(events: Sequence[Residency], title: str = "", unit: str = "GB") -> Figure:
    """When each component was on the accelerator: a row for each, a bar for each stay, labelled with its bytes.

    `unit` is "GB" or "MB" (1e9 or 1e6 bytes).

    Raises:
        ValueError: there are no events, or the unit is another.
    """
    if not events or unit not in ("GB", "MB"):
        raise ValueError('residency_timeline needs events, and "GB" or "MB" as the unit')
    scale = {"GB": 1e9, "MB": 1e6}[unit]
    rows = list(dict.fromkeys(event.component for event in events))
    end = max(event.offload_s for event in events)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.55 * len(rows) + 1.3), layout="constrained")
        for event in events:
            row = rows.index(event.component)
            colour = COLOURS[row % len(COLOURS)]
            # A very short stay is still a visible line.
            length = max(event.offload_s - event.onload_s, end / 400)
            axes.barh(row, length, left=event.onload_s, height=0.5, color=colour)
            text = f"{_short(event.bytes / scale)} {unit}"
            # A name after the bar, or before it where the bar ends far to the right.
            late = event.onload_s + length > 0.85 * end
            inside = late and event.onload_s < 0.15 * end
            axes.text(
                event.onload_s + (length / 2 if inside else -0.01 * end if late else length + 0.01 * end),
                row,
                text,
                va="center",
                ha="center" if inside else "right" if late else "left",
                color="white" if inside else "black",
                fontsize=9,
            )
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # first row on top
        axes.set_xlim(0, end * 1.02)
        axes.set(xlabel="time since the call began (s)", title=title)
        axes.grid(axis="x", alpha=0.3)
    plt.close(figure)
    return figure


def activity_timeline(
    recordings: Mapping[str, Sequence[Activity]], start_ms: float, end_ms: float, title: str = ""
) -> Figure:
    """What the accelerator did between two moments: for each recording a lane of copies there, compute and copies back.

    Where a copy lies over compute it costs no time; where it lies over a gap, the accelerator waits for it.

    Raises:
        ValueError: there are no recordings.
    """
    if not recordings:
        raise ValueError("activity_timeline needs recordings")
    rows = len(KINDS) + 1  # a line for the name above the lanes of each recording
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.28 * rows * len(recordings) + 1.3), layout="constrained")
        lanes = {}
        for index, (name, entries) in enumerate(recordings.items()):
            axes.text(start_ms, rows * index, name, weight="bold", va="center")
            for row, kind in enumerate(KINDS, rows * index + 1):
                spans = [
                    (max(entry.start_ms, start_ms), min(entry.end_ms, end_ms) - max(entry.start_ms, start_ms))
                    for entry in entries
                    if entry.kind == kind and entry.end_ms > start_ms and entry.start_ms < end_ms
                ]
                axes.broken_barh(spans, (row - 0.4, 0.8), color=COLOURS[KINDS.index(kind)], lw=0)
                lanes[row] = kind
        axes.set_yticks(list(lanes), list(lanes.values()))
        axes.set_ylim(rows * len(recordings) - 0.4, -0.6)  # first lane on top
        axes.set_xlim(start_ms, end_ms)
        axes.set(xlabel="time (ms)", title=title)
        axes.grid(axis="x", alpha=0.3)
    plt.close(figure)
    return figure

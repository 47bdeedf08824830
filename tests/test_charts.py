import itertools
from dataclasses import replace

import draw_results
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text
from PIL import Image

from helpers import charts
from helpers.activity import Activity
from helpers.records import Measurement
from helpers.residency import Residency

MEASUREMENTS = [
    Measurement("bf16, everything on the accelerator all the time", latency_s=5.0, run_peak_gb=33.0),
    Measurement("nf4", latency_s=5.2, run_peak_gb=14.05),
    Measurement("nf4 + compile", latency_s=4.31, run_peak_gb=14.05),
    Measurement("nf4 + regional compile", latency_s=4.35, run_peak_gb=14.06),
    Measurement("nf4 + regional compile + model offload", latency_s=9.3, run_peak_gb=7.14),
]
EVENTS = [
    Residency("text_encoder", 0.0, 0.1, 246_000_000, 246_000_000, 1),
    Residency("transformer", 0.1, 5.5, 6_700_000_000, 6_700_000_000, 1),
    Residency("vae", 5.5, 5.501, 168_000_000, 168_000_000, 1),
    Residency("text_encoder", 5.501, 6.0, 246_000_000, 246_000_000, 1),
]
# Severity 1.0, on linear RGB: Machado, Oliveira and Fernandes (2009), https://doi.org/10.1109/TVCG.2009.113
SIGHTS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # IEC 61966-2-1


def lab(colour: str, sight: str) -> np.ndarray:
    """A colour in CIELAB as eyes of some sight see it: lightness of 0 to 100 comes first."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = SRGB_TO_XYZ @ (SIGHTS[sight] @ linear).clip(0, 1) / SRGB_TO_XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture(autouse=True)
def every_figure_is_closed():
    yield
    assert plt.get_fignums() == []  # an open figure would show a second time


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("pair", itertools.combinations((*charts.COLOURS, "white"), 2), ids="-".join)
def test_colours_survive_colour_blindness_and_grey_print(pair, sight):
    one, other = (lab(colour, sight) for colour in pair)
    assert np.linalg.norm(one - other) >= 20  # 2 are just seen side by side
    if sight == "usual":
        assert abs(one[0] - other[0]) >= 15


def boxes_of(figure) -> dict[str, object]:
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    return {label.get_text(): Text.get_window_extent(label) for label in labels}


@pytest.mark.parametrize(
    "measurements", [MEASUREMENTS, [Measurement(f"technique {i}", latency_s=1.0, run_peak_gb=2.0) for i in range(7)]]
)
def test_labels_of_points_do_not_overlap(measurements):
    figure = charts.latency_memory_chart(measurements, title="nf4 halves the memory")
    boxes = boxes_of(figure)
    assert sorted(boxes) == sorted(entry.name for entry in measurements)
    for (first, one), (second, other) in itertools.combinations(boxes.items(), 2):
        assert not one.overlaps(other), (first, second)
    (axes,) = figure.axes
    for name, box in boxes.items():  # beside the axes, and whole
        assert axes.bbox.x1 < box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, name
    points = [tuple(point) for part in axes.collections for point in part.get_offsets()]
    assert sorted(points) == sorted((entry.peak_gb, entry.latency_s) for entry in measurements)
    ends = {label.get_text(): label.xy for label in axes.texts}  # of the line from each name
    assert ends == {entry.name: (entry.peak_gb, entry.latency_s) for entry in measurements}
    assert axes.get_title(loc="left") == "nf4 halves the memory"
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0


def test_chart_on_a_cpu_uses_another_field():
    entry = Measurement("nf4", latency_s=1.0, footprint_gb=0.004)
    figure = charts.latency_memory_chart([entry], memory="footprint_mb", memory_label="weights (MB)")
    assert figure.axes[0].get_xlabel() == "weights (MB)"
    assert [tuple(point) for part in figure.axes[0].collections for point in part.get_offsets()] == [(4.0, 1.0)]
    with pytest.raises(ValueError, match="'nf4' has no latency_s or no peak_gb"):
        charts.latency_memory_chart([entry])


def test_image_grid():
    row = [np.zeros((8, 8, 3)), np.ones((8, 8, 3))]
    figure = charts.image_grid([row, row[:1]], ["first", "second"], ["bf16", "nf4"])
    assert len(figure.axes) == 4 and [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["first", "second"]
    assert [figure.axes[0].get_ylabel(), figure.axes[2].get_ylabel()] == ["bf16", "nf4"]
    assert repr(figure) == "<Figure size 360x390 with 4 Axes>"
    long = charts.image_grid([row], ["pineapple on a pink background"] * 2).axes[0]
    assert long.get_title() == "pineapple on a\npink background"  # beside its neighbour, not over it


def test_weight_histogram():
    weight = torch.tensor([-1.0, 0.5, 0.5, 1.0], dtype=torch.bfloat16)
    figure = charts.weight_histogram({"bf16": weight, "nf4": np.array([0.0, 0.0])}, title="16 levels", bins=4)
    counts = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert counts == [[1, 0, 2, 1], [0, 0, 2, 0]] or counts == [[1, 0, 1, 2], [0, 0, 2, 0]]
    assert figure.axes[0].get_title(loc="left") == "16 levels"


def test_residency_timeline():
    figure = charts.residency_timeline(EVENTS, title="One at a time")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["text_encoder", "transformer", "vae"]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert [(round(row), x) for row, x, _ in bars] == [(0, 0.0), (1, 0.1), (2, 5.5), (0, 5.501)]
    assert bars[1][2] == pytest.approx(5.4)
    assert bars[2][2] > 0.005  # too short to see otherwise
    assert [text.get_text() for text in axes.texts] == ["0.25 GB", "6.70 GB", "0.17 GB", "0.25 GB"]
    figure.draw_without_rendering()
    for text, bar in zip(axes.texts, axes.patches, strict=True):
        box = text.get_window_extent()
        assert not box.overlaps(bar.get_window_extent()) and box.x1 <= axes.bbox.x1
    megabytes = charts.residency_timeline(EVENTS, unit="MB").axes[0]
    assert megabytes.texts[0].get_text() == "246 MB"


def test_a_component_keeps_its_colour_in_another_order():
    def colours(events):
        (axes,) = charts.residency_timeline(events).axes
        return {event.component: bar.get_facecolor() for event, bar in zip(events, axes.patches, strict=True)}

    assert colours(EVENTS) == colours(EVENTS[::-1]) and len(set(colours(EVENTS).values())) == 3


def test_timeline_needs_events():
    with pytest.raises(ValueError, match="needs events"):
        charts.residency_timeline([])


def test_bars_show_every_measurement_with_both_peaks():
    rows = [
        Measurement("nf4", latency_s=5.2, step_ms=190.0, load_peak_gb=11.0, run_peak_gb=14.05),
        Measurement("saved nf4", latency_s=9.3, step_ms=150.0, load_peak_gb=0.0, run_peak_gb=7.14),
    ]
    left, right = charts.latency_memory_bars(rows, "step_ms").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["nf4", "saved nf4"]
    assert [bar.get_width() for bar in left.patches] == [190.0, 150.0]
    assert [bar.get_width() for bar in right.patches] == [11.0, 0.0, 14.05, 7.14]


def test_labels_of_axes_are_whole_beside_long_names():
    name = "saved nf4, block group offload with the rest on the card, compiled inside"
    figure = charts.latency_memory_bars([Measurement(name, latency_s=5.2, reserved_gb=7.9)])
    figure.draw_without_rendering()
    left, right = (axes.xaxis.label.get_window_extent() for axes in figure.axes)
    assert not left.overlaps(right) and right.x1 <= figure.bbox.x1


def test_bars_on_a_cpu_show_host_memory():
    left, right = charts.latency_memory_bars([Measurement("nf4", latency_s=5.2, host_peak_gb=1.5)]).axes
    assert [bar.get_width() for bar in right.patches] == [1.5]
    assert right.get_xlabel() == "host memory (GB)"


def test_charts_show_the_reserved_memory_where_all_have_it_and_say_so():
    rows = [
        Measurement("nf4", latency_s=5.2, load_peak_gb=11.0, run_peak_gb=14.05, reserved_gb=15.0),
        Measurement("saved nf4", latency_s=9.3, load_peak_gb=0.0, run_peak_gb=7.14, reserved_gb=8.0),
    ]
    _, right = charts.latency_memory_bars(rows).axes
    (axes,) = charts.latency_memory_chart(rows).axes
    assert [bar.get_width() for bar in right.patches] == [15.0, 8.0]
    assert sorted(x for part in axes.collections for x, _ in part.get_offsets()) == [8.0, 15.0]
    assert right.get_xlabel() == axes.get_xlabel() == "memory reserved (GB)"
    rows[0] = replace(rows[0], reserved_gb=None)  # an older one
    _, right = charts.latency_memory_bars(rows).axes
    (axes,) = charts.latency_memory_chart(rows).axes
    assert [bar.get_width() for bar in right.patches] == [11.0, 0.0, 14.05, 7.14]
    assert sorted(x for part in axes.collections for x, _ in part.get_offsets()) == [7.14, 14.05]
    assert right.get_xlabel() == axes.get_xlabel() == "memory allocated (GB)"


@pytest.mark.parametrize("rows", [[], [Measurement("nf4")]])
def test_bars_without_figures_are_an_error(rows):
    with pytest.raises(ValueError, match="latency_s"):
        charts.latency_memory_bars(rows)


def test_activity_lanes():
    activities = [Activity("copy to the accelerator", 0.0, 4.0), Activity("compute", 3.0, 9.0)]
    (axes,) = charts.activity_timeline({"leaf": activities, "block": activities[:1]}, 2.0, 8.0).axes
    spans = [
        [(box.x0, box.x1) for box in (path.get_extents() for path in lane.get_paths())] for lane in axes.collections
    ]
    assert spans == [[(0.0, 4.0)], [(3.0, 9.0)], [], [(0.0, 4.0)], [], []]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["", *charts.KINDS] * 2 and [text.get_text() for text in axes.texts] == ["leaf", "block"]
    assert axes.get_xlim() == (2.0, 8.0)
    with pytest.raises(ValueError, match="recordings"):
        charts.activity_timeline({}, 0, 1)


def test_reserved_chart_joins_what_is_streamed():
    def row(name, reserved_gb, step_ms, latency_s):
        return Measurement(name, reserved_gb=reserved_gb, step_ms=step_ms, latency_s=latency_s)

    rows = [
        row("saved nf4, streamed, 9 GB, regional compile", 9, 2, 5),
        row("saved nf4, resident, eager", 14, 1, 4),
        row("bf16, resident, eager", 30, 1, 4),
        row("saved nf4, streamed, 5 GB, regional compile", 5, 3, 6),
    ]
    others = [row(f"saved nf4, {way}, eager", 14, 1, 4) for way in "abcd"]
    assert len({line.get_marker() for line in charts.reserved_chart(rows[:1] + others).axes[0].lines}) == 5
    for axes, values in zip(charts.reserved_chart(rows).axes, ((3, 2), (6, 5)), strict=True):
        line, point = axes.lines
        assert (tuple(line.get_xdata()), tuple(line.get_ydata())) == ((5, 9), values)
        assert line.get_label() == "streamed (fill_card)"
        assert point.get_label() == "resident" and point.get_xdata() == [14]
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(values)


def test_the_chart_of_the_readme_is_of_these_results():
    with Image.open(draw_results.CHART) as picture:
        assert picture.text["Source"] == draw_results.digest(), "the results changed: run `make chart`"

"""A measurement as a record: its fields, tables of records, where and with what they were measured."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.checkpoints import Checkpoint
from helpers.devices import GB, component_footprints, environment
from helpers.measure import Load, Run

if TYPE_CHECKING:
    import pandas

MISSING = "–"


@dataclass(frozen=True)
class Measurement:
    """One configuration, measured. What a table shows is a field here."""

    name: str  # what was combined, such as "nf4 + compile"
    load_s: float | None = None  # from_pretrained until ready
    first_call_s: float | None = None  # the first call, compilation included
    latency_s: float | None = None  # median of the later calls
    step_ms: float | None = None  # median denoising step
    load_peak_gb: float | None = None  # highest allocated accelerator memory while loading; None on a CPU
    run_peak_gb: float | None = None  # the same while running
    reserved_gb: float | None = None  # highest that PyTorch had reserved, loading included: what the card must have
    host_peak_gb: float | None = None  # highest resident host memory, loading and running
    footprint_gb: float | None = None  # bytes of all weights, wherever they are
    # Where, with what and on what this was measured.
    device: str | None = None
    driver: str | None = None
    torch: str | None = None
    diffusers: str | None = None
    transformers: str | None = None
    bitsandbytes: str | None = None
    model: str | None = None
    checkpoint_size: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    frames: int | None = None
    seed: int | None = None
    repeats: int | None = None
    date: str | None = None
    warmups: int | None = None  # calls after the first that count for nothing
    latencies_s: list[float] | None = None  # of each of the `repeats` after them
    call: dict[str, Any] | None = None  # what the pipeline was called with, where that was not left to it
    skipped: float | None = None  # share of the denoiser's calls that a cache cut short; None without a cache
    distance: float | None = None  # of its picture to another, by `helpers.quality`, in levels of 0 to 255
    failure: str | None = None  # why there are no figures, in one sentence; None if it ran
    source: str | None = None  # where a figure that was not measured here is published

    @property
    def peak_gb(self) -> float | None:
        """The larger of the two accelerator peaks. None on a CPU."""
        peaks = [peak for peak in (self.load_peak_gb, self.run_peak_gb) if peak is not None]
        return max(peaks, default=None)

    @property
    def spread_s(self) -> float | None:
        """The slowest of the later calls less the fastest."""
        return max(self.latencies_s) - min(self.latencies_s) if self.latencies_s else None


def measurement(
    name: str,
    checkpoint: Checkpoint,
    load: Load | None = None,
    run: Run | None = None,
    pipeline: Any | None = None,
    **changes: Any,
) -> Measurement:
    """Put together what `measure_load` and `measure_run` returned with where and on what it was measured.

    `pipeline` gives `footprint_gb`. `changes` are fields that differ from the checkpoint's, such as `steps=4`.
    """
    values: dict[str, Any] = {
        **environment(),
        "model": checkpoint.model,
        "checkpoint_size": checkpoint.size,
        "height": checkpoint.height,
        "width": checkpoint.width,
        "steps": checkpoint.num_inference_steps,
        "frames": checkpoint.num_frames,
        "seed": checkpoint.seed,
        "call": checkpoint.call_arguments,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if load is not None:
        values |= vars(load)
    if run is not None:
        values |= {field: content for field, content in vars(run).items() if field != "output"}
        values["repeats"] = len(run.latencies_s)
    values["host_peak_gb"] = max((part.host_peak_gb for part in (load, run) if part is not None), default=None)
    if pipeline is not None:
        values["footprint_gb"] = sum(sum(sizes.values()) for sizes in component_footprints(pipeline).values()) / GB
    return Measurement(name, **(values | changes))


def load_measurements(path: str | Path) -> list[Measurement]:
    """Read the measurements in a JSON file. Raises TypeError if one has other fields, as from an older version."""
    return [Measurement(**values) for values in json.loads(Path(path).read_text(encoding="utf-8"))]


def with_distances(measurements: Sequence[Measurement], path: str | Path) -> list[Measurement]:
    """The measurements, each with the `distance` of the row of its name in another file; KeyError if it has none.

    For random weights, whose pictures are noise: the distance is that of the pocket model's picture.
    """
    distances = {entry.name: entry.distance for entry in load_measurements(path)}
    return [replace(entry, distance=distances[entry.name]) for entry in measurements]


def provenance(measurements: Sequence[Measurement]) -> str:
    """Where, with what, on what and when these were measured, in one line. All but the dates are those of the first."""
    first = measurements[0]
    frames = "" if first.frames is None else f"{first.frames} frames of "
    drawn = f"{frames}{first.width}x{first.height}"
    repeats = "1 repeat" if first.repeats == 1 else f"{first.repeats} repeats"
    dates = sorted({entry.date for entry in measurements})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{first.device}, torch {first.torch}, {drawn}, {first.steps} steps, {repeats}, {when}"


def table(rows: Sequence[Any], columns: Sequence[str], digits: int = 3) -> "pandas.DataFrame":
    """A table with one line for each of `rows`: measurements, or mappings from the names of `columns` to values.

    The first column is the index. Cells are text, the same on every machine: a column of numbers has as many decimals
    as leave its largest one `digits` digits; True and False are yes and no, and what is missing is a dash.
    """
    import pandas  # here: the processes that measure import this file, and do not need its 30 MB

    # As text too, names are whole, and a table is not folded.
    pandas.set_option("display.max_colwidth", None, "display.width", 160)
    texts = {column: _texts([value(row, column) for row in rows], digits) for column in columns}
    frame = pandas.DataFrame(texts).set_index(columns[0])
    return frame.rename_axis(index=None, columns=columns[0])


def _texts(values: Sequence[Any], digits: int) -> list[str]:
    words = {None: MISSING, True: "yes", False: "no"}
    numbers = [entry for entry in values if isinstance(entry, (int, float)) and not isinstance(entry, bool)]
    whole = all(isinstance(entry, int) for entry in numbers)
    places = 0 if whole else decimals(max(map(abs, numbers)), digits)

    def text(entry: Any) -> str:
        if entry is None or isinstance(entry, bool):
            return words[entry]
        return f"{entry:.{places}f}" if isinstance(entry, (int, float)) else str(entry)

    return [text(entry) for entry in values]


def decimals(number: float, digits: int = 3) -> int:
    """How many decimals leave `digits` digits of a number, at most: 2 for 5.40, 1 for 14.1, 0 for 170."""
    return max(0, digits - len(str(int(abs(number)))))


def value(row: Any, name: str) -> Any:
    """A field of a measurement or of a mapping, None if there is none. `peak_mb` is `peak_gb` in MB, and so on."""
    if isinstance(row, Measurement) and name.endswith("_mb"):
        in_gb = value(row, name.removesuffix("mb") + "gb")
        return None if in_gb is None else in_gb * 1e3
    return row.get(name) if isinstance(row, dict) else getattr(row, name)

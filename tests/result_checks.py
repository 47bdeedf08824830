"""Rules that every recorded result obeys. Each takes the name of a file and its rows, and returns sentences.

`rules_of` says which of them a file is held to. A figure that obeys them all and was edited all the same is noticed by
its digest: benchmarks/results/SHA256SUMS.
"""

import datetime
import hashlib
import re
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import programs, strategies
from benchmarks.__main__ import slug
from helpers.activity import KINDS
from helpers.records import Measurement

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SUMS = RESULTS / "SHA256SUMS"

WHERE = ("device", "driver", "torch", "diffusers", "transformers", "bitsandbytes")
WHAT = ("model", "checkpoint_size", "height", "width", "frames", "steps", "seed", "repeats", "warmups")
SECONDS = ("load_s", "first_call_s", "latency_s", "step_ms")
MEMORY = ("load_peak_gb", "run_peak_gb", "host_peak_gb", "footprint_gb", "reserved_gb")
FIGURES = (*SECONDS, *MEMORY, "distance")
# Other rows than the combinations of the benchmark: those that a lesson's cells measure.
# What lessons 2 and 3 had to copy before there was draw.py, by the card that it was for.
OF_EARLIER_LESSONS = ("24 GB", "16 GB", "12 GB", "8 GB", "6 GB", "the rest stays")
OF_LESSONS = re.compile(
    r"(nf4|bf16), (resident|leaf|block)(, disk)?(, stream)?(, record_stream|, low_cpu_mem_usage)?"
    r"|nf4, leaf, then compile \(recipe 3\)"
    r"|nf4, compiled blocks, then block|decoded (whole|in tiles)"
    r"|move all, then offload|offload after loading|encode, free, then load|saved nf4 on the CPU, offload"
)


def check_fields(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """Only fields of a measurement, under names that are known, each once."""
    known = {entry.name for entry in fields(Measurement)}
    names = [row["name"] for row in rows]
    measured = {*strategies.COMBINATIONS, *strategies.VARIANTS}
    return [
        *(f"{row['name']}: unknown field {key}" for row in rows for key in row.keys() - known),
        *(
            f"{name}: no such combination"
            for name in names
            if name not in measured and not OF_LESSONS.fullmatch(name) and not strategies.is_combination(name)
        ),
        *(f"{name}: there twice" for name in set(names) if names.count(name) > 1),
    ]


def check_provenance(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """Where, with what and on what is complete, the same in all rows, and as the name of the file says."""
    first, problems = rows[0], []
    for row in rows:
        name = row["name"]
        needed = {*WHERE, *WHAT, "date"} - {"driver" if "NVIDIA" not in row["device"] else ""}
        needed -= {"frames"} if row["model"] != "wan" else set()
        problems += [f"{name}: no {key}" for key in sorted(needed) if row.get(key) is None]
        problems += [f"{name}: another {key} than the first row" for key in (*WHERE, *WHAT) if row[key] != first[key]]
        problems += check_date(name, row["date"])
        call, settings = row["call"] or {}, first["call"] or {}  # no prompt: it was encoded before
        problems += [f"{name}: called with another {key}" for key in call if call[key] != settings.get(key, call[key])]
        fields_of = {"height": "height", "width": "width", "num_frames": "frames", "num_inference_steps": "steps"}
        problems += [
            f"{name}: called with another {key}" for key in fields_of if call and call.get(key) != row[fields_of[key]]
        ]
    stem = Path(file).stem
    start, device = f"{first['model']}-{first['checkpoint_size']}", slug(first["device"])
    if not (stem.startswith(f"{start}_") and stem.endswith(f"_{device}")):
        problems.append(f"the file's name does not say {start} on {device}")
    return problems


def check_times(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """`latency_s` is the median of `latencies_s`, the steps are a part of it, and a first call compiles."""
    problems = []
    for row in rows:
        name, latency, latencies = row["name"], row["latency_s"], row["latencies_s"]
        if row["failure"] is not None:
            continue
        if latencies is not None and latency != statistics.median(latencies):
            problems.append(f"{name}: latency_s is {latency}, not the median of {latencies}")
        if latencies is not None and row["repeats"] != len(latencies):
            problems.append(f"{name}: {row['repeats']} repeats, {len(latencies)} latencies")
        steps_s = row["steps"] * (row["step_ms"] or 0) / 1e3
        least = min(0.08, 0.015 * row["steps"])  # of few steps, moving the weights takes most
        if latency is not None and steps_s and not least * latency < steps_s < 1.1 * latency:
            problems.append(f"{name}: its steps take {steps_s:.1f} s of a call of {latency:.1f} s")
        if latency is not None and row["first_call_s"] is not None and row["first_call_s"] < 0.7 * latency:
            problems.append(f"{name}: the first call takes {row['first_call_s']:.1f} s, a later one {latency:.1f} s")
    return problems


def check_memory(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """Peaks agree with each other and with the bytes of the weights; 4 bits are smaller than 16."""
    problems = []
    whole = max(
        (row["footprint_gb"] for row in rows if row["name"].startswith("bf16") and row["footprint_gb"]), default=0
    )
    for row in rows:
        name, weights, run = row["name"], row["footprint_gb"], row["run_peak_gb"]
        if row.get("reserved_gb") is not None and row["reserved_gb"] < max(run or 0, row["load_peak_gb"] or 0):
            problems.append(f"{name}: less is reserved than allocated")
        limit = re.match(r"(?:bf16|saved nf4), streamed, ([\d.]+) GB", name)  # nf4 is quantized on the card before
        page = 20 * 2**20 / 1e9  # by which PyTorch passed a limit, before `devices.limit_memory` took it off
        if limit and (row["reserved_gb"] or 0) > float(limit[1]) + page:
            problems.append(f"{name}: {row['reserved_gb']} GB reserved")
        if "resident" in name and None not in (weights, run, row["load_peak_gb"]):
            if not weights <= row["load_peak_gb"] <= run:
                problems.append(f"{name}: weights {weights:.2f}, loading {row['load_peak_gb']:.2f}, running {run:.2f}")
        if weights and "nf4" in name and whole and not 0.2 * whole < weights < 0.75 * whole:
            problems.append(f"{name}: weights of {weights:.2f} GB, {whole:.2f} in bf16")
        if run is not None and "NVIDIA" not in row["device"]:
            problems.append(f"{name}: accelerator memory of a machine without an accelerator")
        if run is None and "NVIDIA" in row["device"] and row["failure"] is None:
            problems.append(f"{name}: no run_peak_gb")
        if weights and row["host_peak_gb"] and "offload" in name and row["host_peak_gb"] < 0.9 * weights:
            problems.append(f"{name}: {weights:.2f} GB wait in {row['host_peak_gb']:.2f} GB of host memory")
    return problems


def check_figures(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """A row has figures, all of them above zero, or says in one sentence why it has none."""
    problems = []
    for row in rows:
        given = {key: row[key] for key in FIGURES if row.get(key) is not None}
        if row["failure"] is not None:
            problems += [f"{row['name']}: it failed and has {key}" for key in given]
            problems += [] if row["failure"].endswith(".") else [f"{row['name']}: its failure is no sentence"]
        elif row["latency_s"] is None and row["step_ms"] is None:
            problems.append(f"{row['name']}: no latency_s, no step_ms, and no failure")
        # Weights that wait in host memory load with none on the accelerator; the first picture is its own yardstick.
        problems += [
            f"{row['name']}: {key} is {value}"
            for key, value in given.items()
            if not (value >= 0 if key in ("load_peak_gb", "distance") else value > 0)
        ]
    return problems


def check_distances(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """The pocket model's pictures: nf4 is as far from bf16 in each of its rows, compiling hardly changes anything."""
    problems = []
    for row in rows:
        wanted = {"bf16, resident, eager": (0, 0)}.get(row["name"], (0, 0.5) if "bf16" in row["name"] else (2, 3))
        if row["distance"] is None or not wanted[0] <= row["distance"] <= wanted[1]:
            problems.append(f"{row['name']}: distance {row['distance']}, not {wanted[0]} to {wanted[1]}")
    return problems


def check_cited(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """A cited row names its source and claims nothing that was measured here."""
    allowed = {"name", "latency_s", "run_peak_gb", "device", "model", "checkpoint_size", "source"}
    return [
        f"{row['name']}: no source, no figure, or a field that is not cited"
        for row in rows
        if set(row) != allowed
        or not row["source"].startswith("https://")
        or not min(row["latency_s"], row["run_peak_gb"]) > 0
    ]


def check_limits(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """A program that fits has a time and stays below its limit; one that does not has none."""
    problems = []
    for row in rows:
        name = f"{row['model']}, {row['program']}, {row['limit_gb']} GB"
        problems += [f"{name}: no {key}" for key in WHERE if not row[key]] + check_date(name, row["date"])
        problems += [f"{name}: another {key} than the first row" for key in WHERE if row[key] != rows[0][key]]
        if row["program"] not in (*programs.DRAWING, *programs.SAVING, *OF_EARLIER_LESSONS):
            problems.append(f"{name}: there is no such program")
        least = 0 if row["program"].endswith("--device cpu") else 0.1  # a card that is used holds that at once
        if not least <= row["allocated_gb"] <= row["reserved_gb"] <= row["limit_gb"]:
            problems.append(f"{name}: {row['allocated_gb']} GB allocated, {row['reserved_gb']} reserved")
        if (row["call_s"] or 0) > 0 and row["fits"] is not True or row["call_s"] is None and row["fits"] is not False:
            problems.append(f"{name}: fits is {row['fits']} with a call of {row['call_s']} s")
    keys = [tuple(row[key] for key in ("model", "program", "limit_gb", "expandable_segments")) for row in rows]
    return problems + [f"{key}: there twice" for key in set(keys) if keys.count(key) > 1]


def check_slow_bus(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """A step is as long as its compute and its copies, or longer, and not as long as both together and more."""
    problems = []
    for row in rows:
        name = f"{row['budget_gb']} GB, {row['copies']} copies"
        problems += [f"{name}: no {key}" for key in WHERE if not row[key]] + check_date(name, row["date"])
        problems += [
            f"{name}: another {key} than the first row" for key in (*WHERE, "resident_ms") if row[key] != rows[0][key]
        ]
        copying_ms = 1e3 * row["copied_gb"] * row["copies"] / row["bus_gb_s"]
        least, most = max(copying_ms, row["resident_ms"]), copying_ms + row["resident_ms"]
        if not 0.9 * least < row["step_ms"] < most:
            problems.append(f"{name}: a step of {row['step_ms']:.0f} ms, not {least:.0f} to {most:.0f}")
    keys = [(row["budget_gb"], row["copies"]) for row in rows]
    return problems + [f"{key}: there twice" for key in set(keys) if keys.count(key) > 1]


def check_copies(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """Pinned memory is the fastest in every run, and nothing is faster than a bus of PCIe 5.0."""
    problems = [
        f"no {key}" for row in rows for key in ("device", "driver", "torch") if row[key] != rows[0][key] or not row[key]
    ]
    speeds = {row["copy"]: [row[key] for key in row if key.endswith("GB/s")] for row in rows}
    pageable, pinned, back = (speeds[name] for name in ("pageable, to the card", "pinned, to the card", "back"))
    if not all(
        0 < min(one, three) and max(one, three) < two < 64
        for one, two, three in zip(pageable, pinned, back, strict=True)
    ):
        problems.append(f"not in the order that a bus allows: {speeds}")
    return problems + [
        problem for row in rows for date in row["date"].split(" to ") for problem in check_date("copies", date)
    ]


def check_activity(file: str, rows: list[dict[str, Any]]) -> list[str]:
    """Each recording has each kind of work, in spans that follow one another."""
    (content,) = rows
    environment = content["environment"]
    problems = [f"no {key}" for key in WHERE if not environment[key]] + check_date("recording", environment["date"])
    for name, kinds in content["recordings"].items():
        if set(kinds) != set(KINDS):
            problems.append(f"{name}: has {sorted(kinds)}")
        for kind, spans in kinds.items():
            times = [time for span in spans for time in span]
            if times != sorted(times) or any(len(span) != 2 for span in spans):
                problems.append(f"{name}: the spans of {kind} are not in order")
    return problems


def check_date(name: str, date: str) -> list[str]:
    """A day that has been, since the project began."""
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError:
        return [f"{name}: {date} is no date"]
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)  # it is that already, somewhere
    return [] if datetime.date(2026, 11, 1) <= day <= tomorrow else [f"{name}: nothing was measured on {date}"]


def rules_of(file: str) -> list:
    """The rules for a file, by its name."""
    for word, rule in {
        "limits_": check_limits,
        "copies_": check_copies,
        "slow-bus_": check_slow_bus,
        "_activity_": check_activity,
        "cited": check_cited,
    }.items():
        if word in file:
            return [rule]
    rules = [check_fields, check_provenance, check_figures, check_times, check_memory]
    return [*rules, check_distances] if re.match(r"\w+-pocket_(?!settings)", file) else rules


def digests() -> dict[str, str]:
    """SHA256SUMS: the digest of each file of results."""
    return {name: digest for digest, name in (line.split("  ") for line in SUMS.read_text().splitlines())}


def digest(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` writes it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

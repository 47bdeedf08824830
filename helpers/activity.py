"""What the accelerator does when: copies and compute, from the profiler of PyTorch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.devices import accelerator, environment, synchronize
from helpers.records import write_json

KINDS = ("copy to the accelerator", "compute", "copy back")


@dataclass(frozen=True)
class Activity:
    """One copy or one kernel.

    Attributes:
        kind: one of `KINDS`.
        start_ms, end_ms: milliseconds since the first activity of the recording.
    """

    kind: str
    start_ms: float
    end_ms: float


def record_activity(function: Callable[[], Any]) -> list[Activity]:
    """Call `function` once and return what the accelerator did, in order of start; an empty list on a CPU.

    Source: `torch.profiler` (https://docs.pytorch.org/docs/stable/profiler.html). It makes the call a little slower.
    """
    device = accelerator()
    if device.type == "cpu":
        function()
        return []
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    synchronize()
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        function()
        synchronize()
    spans = []
    for event in profile.events():
        kind = _kind(event.name)
        if event.device_type.name != "CPU" and kind is not None:
            spans.append((event.time_range.start, event.time_range.end, kind))
    first = min((start for start, _, _ in spans), default=0)
    return [Activity(kind, (start - first) / 1e3, (end - first) / 1e3) for start, end, kind in sorted(spans)]


def _kind(name: str) -> str | None:
    """Kind of an activity by the profiler's name for it; None for what is neither copy nor compute."""
    if name.startswith("Memcpy HtoD"):
        return "copy to the accelerator"
    if name.startswith("Memcpy DtoH"):
        return "copy back"
    if name.startswith(("Memcpy", "Memset")):
        return None  # inside of the accelerator
    return "compute"


def busy_ms(activities: Sequence[Activity], kind: str) -> float:
    """Milliseconds in which at least one activity of `kind` runs."""
    return sum(end - start for start, end in _merge(activities, kind))


def hidden_share(activities: Sequence[Activity]) -> float:
    """Share of the time of the copies to the accelerator, from 0 to 1, during which it also computes.

    Raises:
        ValueError: nothing was copied there.
    """
    copies, kernels = _merge(activities, KINDS[0]), _merge(activities, "compute")
    total = sum(end - start for start, end in copies)
    if not total:
        raise ValueError("nothing was copied to the accelerator")
    hidden, index = 0.0, 0
    for start, end in copies:
        while index < len(kernels) and kernels[index][1] <= start:
            index += 1
        for left, right in kernels[index:]:
            if left >= end:
                break
            hidden += min(end, right) - max(start, left)
    return hidden / total


def save_activities(
    recordings: Mapping[str, Sequence[Activity]], path: str | Path, start_ms: float, end_ms: float
) -> None:
    """Write what of each recording lies between two moments, overlapping spans of a kind joined, as JSON.

    The file also says on which device and with which versions it was recorded.

    Raises:
        TutorialError: the file cannot be written; what it would hold is printed.
    """
    lanes = {
        name: {
            kind: [[round(a - start_ms, 3), round(b - start_ms, 3)] for a, b in _merge(activities, kind)
                   if b > start_ms and a < end_ms]
            for kind in KINDS
        }
        for name, activities in recordings.items()
    }  # fmt: skip
    write_json({"environment": environment(), "recordings": lanes}, path, indent=None)


def load_activities(path: str | Path) -> dict[str, list[Activity]]:
    """Read what `save_activities` wrote; the beginning of the window is 0 ms."""
    lanes = json.loads(Path(path).read_text(encoding="utf-8"))["recordings"]
    return {
        name: [Activity(kind, start, end) for kind, spans in kinds.items() for start, end in spans]
        for name, kinds in lanes.items()
    }


def _merge(activities: Sequence[Activity], kind: str) -> list[tuple[float, float]]:
    """The times of one kind, overlapping ones joined, in order."""
    merged: list[tuple[float, float]] = []
    for activity in sorted((entry for entry in activities if entry.kind == kind), key=lambda entry: entry.start_ms):
        if merged and activity.start_ms <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], activity.end_ms))
        else:
            merged.append((activity.start_ms, activity.end_ms))
    return merged

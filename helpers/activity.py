"""What the accelerator does when: copies and compute, from the profiler of PyTorch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.devices import accelerator, synchronize

KINDS = ("copy to the accelerator", "compute", "copy back")


@dataclass(frozen=True)
class Activity:
    """One copy or one kernel, of a kind of `KINDS`; times are milliseconds since the recording's first activity."""

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
    """Kind of an activity by the profiler's name for it; None for copies inside of the accelerator."""
    kinds = {"Memcpy HtoD": KINDS[0], "Memcpy DtoH": KINDS[2], "Memcpy": None, "Memset": None, "": "compute"}
    return next(kind for start, kind in kinds.items() if name.startswith(start))


def busy_ms(activities: Sequence[Activity], *kinds: str) -> float:
    """Milliseconds in which at least one activity of one of the `kinds` runs."""
    return sum(end - start for start, end in merge(activities, *kinds))


def hidden_share(activities: Sequence[Activity]) -> float:
    """Share of the time of the copies to the accelerator, from 0 to 1, in which it also computes.

    Raises ValueError if nothing was copied there.
    """
    copies, compute, _ = KINDS
    total = busy_ms(activities, copies)
    if not total:
        raise ValueError("nothing was copied to the accelerator")
    # What two sets share is what they have, less what they have together.
    return (total + busy_ms(activities, compute) - busy_ms(activities, copies, compute)) / total


def load_activities(path: str | Path) -> dict[str, list[Activity]]:
    """Read recordings from a JSON file: times since the beginning of the recorded window, overlapping spans joined."""
    lanes = json.loads(Path(path).read_text(encoding="utf-8"))["recordings"]
    return {
        name: [Activity(kind, start, end) for kind, spans in kinds.items() for start, end in spans]
        for name, kinds in lanes.items()
    }


def merge(activities: Sequence[Activity], *kinds: str) -> list[tuple[float, float]]:
    """Start and end in ms of the times in which an activity of one of the `kinds` runs, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((entry.start_ms, entry.end_ms) for entry in activities if entry.kind in kinds):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged

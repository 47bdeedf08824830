"""Writes what was measured to JSON files: where one cannot be written, what was measured is printed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers import activity, devices, files
from helpers.errors import TutorialError
from helpers.records import Measurement


def write_json(content: Any, path: str | Path, new: Any | None = None, indent: int | None = 2) -> None:
    """Write a JSON file in one go: a stop half-way, or a full disk, leaves the old file as it was.

    Nothing measured is lost: where the file cannot be written, `new`, or all of the content, is printed.

    Raises:
        TutorialError: the file cannot be written.
    """
    try:
        files.write_text(path, json.dumps(content, indent=indent) + "\n")
    except TutorialError:
        print(json.dumps(content if new is None else new), flush=True)
        raise


def save_measurements(
    measurements: Sequence[Measurement], path: str | Path, new: Sequence[Measurement] | None = None
) -> None:
    """Write measurements for `records.load_measurements`, one object each; `new` and errors as in `write_json`."""
    write_json([asdict(row) for row in measurements], path, None if new is None else [asdict(row) for row in new])


def save_activities(
    recordings: Mapping[str, Sequence[activity.Activity]], path: str | Path, start_ms: float, end_ms: float
) -> None:
    """Write what of each recording lies between two moments, overlapping spans of a kind joined.

    The file, for `activity.load_activities`, also says on which device and with which versions it was recorded. Errors
    as in `write_json`.
    """
    lanes = {
        name: {
            kind: [
                [round(start - start_ms, 3), round(end - start_ms, 3)]
                for start, end in activity.merge(activities, kind)
                if end > start_ms and start < end_ms
            ]
            for kind in activity.KINDS
        }
        for name, activities in recordings.items()
    }
    write_json({"environment": devices.environment(), "recordings": lanes}, path, indent=None)

"""Draws the chart of README.md from the recorded results: `make chart`.

The picture says in its metadata of which results it was drawn, so that a test can tell whether it is current.
"""

import hashlib
import inspect
from pathlib import Path

from helpers import charts, records

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "flux-random_nvidia-h100-80gb-hbm3.json"
CHART = ROOT / "benchmarks" / "flux.png"


def digest() -> str:
    """SHA-256 of the results, of the function that draws them, and of its colours."""
    drawn_by = inspect.getsource(charts.reserved_chart) + str(charts.COLOURS)
    return hashlib.sha256(SOURCE.read_bytes() + drawn_by.encode()).hexdigest()


if __name__ == "__main__":
    charts.reserved_chart(records.load_measurements(SOURCE)).savefig(
        CHART, dpi=100, metadata={"Source": digest(), "Software": None}
    )
    print(CHART)

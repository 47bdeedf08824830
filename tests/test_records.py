import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.writing import save_measurements
from helpers import devices, measure, records
from helpers.checkpoints import CHECKPOINTS
from helpers.records import Measurement


def test_measurement_says_what_where_and_on_what(bf16_pipeline):
    load = measure.Load(load_s=1.0, load_peak_gb=12.0, host_peak_gb=30.0)
    run = measure.Run(9.0, 5.0, [5.0, 4.0, 6.0], 150.0, 14.0, 20.0, None)
    checkpoint = CHECKPOINTS["flux", "pocket"]
    record = records.measurement("nf4", checkpoint, load, run, bf16_pipeline, steps=4)
    assert (record.load_s, record.first_call_s, record.latency_s, record.step_ms) == (1.0, 9.0, 5.0, 150.0)
    assert (record.load_peak_gb, record.run_peak_gb, record.peak_gb, record.host_peak_gb) == (12.0, 14.0, 14.0, 30.0)
    assert (record.checkpoint_size, record.height, record.steps, record.seed) == ("pocket", 128, 4, 0)
    assert record.repeats == 3 and record.torch == torch.__version__
    total = sum(sum(sizes.values()) for sizes in devices.component_footprints(bf16_pipeline).values())
    assert record.footprint_gb == total / 1e9
    optional = {"driver", "frames", "distance", "skipped", "failure", "source", "reserved_gb"}
    assert {name for name, value in asdict(record).items() if value is None} <= optional


def test_provenance_is_one_line():
    row = Measurement("a", device="card", torch="2.11", height=480, width=832, steps=2, repeats=3, date="2026-01-31")
    assert records.provenance([row]) == "card, torch 2.11, 832x480, 2 steps, 3 repeats, 2026-01-31"
    clips = [replace(row, frames=81, repeats=1), replace(row, date="2026-02-01"), row]
    when = "2026-01-31 to 2026-02-01"
    assert records.provenance(clips) == f"card, torch 2.11, 81 frames of 832x480, 2 steps, 1 repeat, {when}"


def test_measurements_survive_a_file(tmp_path):
    checkpoint = CHECKPOINTS["flux", "full"]
    rows = [records.measurement("bf16", checkpoint), Measurement("nf4", latency_s=1.25, run_peak_gb=14.05)]
    save_measurements(rows, tmp_path / "results.json")
    assert records.load_measurements(tmp_path / "results.json") == rows


def test_an_older_row_reserves_nothing_that_is_known(tmp_path):
    (tmp_path / "old.json").write_text('[{"name": "nf4", "run_peak_gb": 14.05}]')
    (row,) = records.load_measurements(tmp_path / "old.json")
    assert row.reserved_gb is None


def test_distances_come_by_name(tmp_path):
    rows = [Measurement("bf16", distance=0.0), Measurement("nf4", distance=2.4)]
    save_measurements(rows, tmp_path / "pocket.json")
    big = [Measurement("nf4", latency_s=4.2), Measurement("bf16")]
    assert records.with_distances(big, tmp_path / "pocket.json") == [replace(big[0], distance=2.4), rows[0]]
    with pytest.raises(KeyError):
        records.with_distances([Measurement("other")], tmp_path / "pocket.json")


def test_unknown_and_missing_fields(tmp_path):
    for row in ({"name": "nf4", "latency": 1}, {"latency_s": 1}):
        (tmp_path / "old.json").write_text(json.dumps([row]))
        with pytest.raises(TypeError, match="latency|name"):
            records.load_measurements(tmp_path / "old.json")


def test_peak_is_the_larger_one_that_is_known():
    assert Measurement("a", load_peak_gb=12.2, run_peak_gb=7.1).peak_gb == 12.2
    assert Measurement("a", run_peak_gb=7.1).peak_gb == 7.1
    assert Measurement("a").peak_gb is None


ROWS = [
    Measurement("bf16", latency_s=12.3456, step_ms=1234.7, repeats=3, footprint_gb=0.0183),
    {"name": "nf4 <b>", "latency_s": 0.25, "repeats": 10, "footprint_mb": 7.8, "step_ms": -5.0, "fits": False},
]


def test_table_as_text():
    frame = records.table(ROWS, ["name", "latency_s", "step_ms", "repeats", "footprint_mb"])
    assert repr(frame).splitlines() == [
        "name    latency_s step_ms repeats footprint_mb",
        "bf16         12.3    1235       3         18.3",
        "nf4 <b>       0.2      -5      10          7.8",
    ]
    fits = [{"card": "6 GB", "fits": True, "call_s": 1.0}, {"card": "8 GB", "fits": False}, {"card": 12, "call_s": 0}]
    assert repr(records.table(fits, ["card", "fits", "call_s"], digits=4)).splitlines() == [
        "card fits call_s",
        "6 GB  yes  1.000",
        "8 GB   no      –",
        "12      –  0.000",
    ]


def test_table_is_whole_and_the_same_each_time():
    name = "nf4 <b>" + ", as long as the names of the benchmark" * 3
    rows = [ROWS[0], ROWS[1] | {"name": name}]
    tables = [records.table(rows, ["name", "latency_s"]) for _ in range(2)]
    assert repr(tables[0]).splitlines()[2] == f"{name}       0.2"  # whole, on one line
    (page,) = {table._repr_html_() for table in tables}
    assert f"<th>{name.replace('<b>', '&lt;b&gt;')}</th>\n      <td>0.2</td>" in page


def test_table_knows_its_fields():
    with pytest.raises(AttributeError, match="latency"):
        records.table(ROWS[:1], ["name", "latency"])


@pytest.mark.parametrize(
    ("number", "places"), [(0.0, 2), (0.0123, 2), (5.4, 2), (-5.4, 2), (14.1, 1), (170.1, 0), (41560.0, 0)]
)
def test_decimals_leave_three_digits(number, places):
    assert records.decimals(number) == places
    assert records.decimals(number, digits=4) in (places + 1, 0)

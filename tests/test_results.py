"""The recorded results obey the rules of `result_checks`, and are those that were measured."""

import copy
import json

import pytest
import result_checks as checks

FILES = sorted(path.name for path in checks.RESULTS.glob("*.json"))


def rows_of(file):
    content = json.loads((checks.RESULTS / file).read_text())
    return content if isinstance(content, list) else [content]


def problems_of(file, rows):
    return [problem for rule in checks.rules_of(file) for problem in rule(file, rows)]


@pytest.mark.parametrize("file", FILES)
def test_results_obey_the_rules(file):
    problems = problems_of(file, rows_of(file))
    assert not problems, f"{file}:\n" + "\n".join(problems)


@pytest.mark.parametrize("file", FILES)
def test_results_are_those_that_were_measured(file):
    assert checks.digests().get(file) == checks.digest(checks.RESULTS / file), (
        f"{file} is not the file that was recorded. If you measured it again: "
        "`cd benchmarks/results && sha256sum *.json > SHA256SUMS`."
    )


def test_no_digest_is_left_over():
    assert sorted(checks.digests()) == FILES


def change(which, **values):
    """Changes the row of that name, or with that index."""

    def break_it(rows):
        (row,) = [row for index, row in enumerate(rows) if which in (index, row.get("name"))]
        row.update(values)

    return break_it


def span(rows):
    next(iter(rows[0]["recordings"].values()))["compute"][7][0] += 100


FLUX, WAN, POCKET = (
    "flux-random_nvidia-h200.json",
    "wan-random_nvidia-h200.json",
    "flux-pocket_amd-epyc-2-threads.json",
)
LIMITS, COPIES = "limits_nvidia-h200.json", "copies_nvidia-h200.json"
SLOW_BUS = "slow-bus_nvidia-h100-80gb-hbm3.json"
CITED, ACTIVITY = "flux-full_rtx-4090_cited.json", "flux-random_activity_nvidia-h200.json"
COMPILED, NF4, OFFLOADED = "bf16, resident, full compile", "nf4, resident, eager", "nf4, model offload, eager"
# A file, a break of it, and a word of the problem that must be found.
BREAKS = [
    (FLUX, change(COMPILED, latency_s=2.91), "median"),
    (FLUX, change(COMPILED, repeats=4), "repeats"),
    (FLUX, change(NF4, step_ms=1867.97), "steps take"),
    (FLUX, change(NF4, first_call_s=0.6), "first call"),
    (FLUX, change(NF4, load_s=-1.0), "load_s is -1.0"),
    (FLUX, change(NF4, load_s=float("nan")), "load_s is nan"),
    (FLUX, change(NF4, load_peak_gb=1.146), "loading 1.15"),
    (FLUX, change(NF4, run_peak_gb=1.405), "running 1.41"),
    (FLUX, change(NF4, reserved_gb=10.0), "less is reserved"),
    (FLUX, change(OFFLOADED, reserved_gb=8.0), "less is reserved"),  # than was allocated while loading
    (FLUX, change(NF4, name="bf16, streamed, 14.9 GB, eager", reserved_gb=15.0), "15.0 GB reserved"),
    (FLUX, change(NF4, footprint_gb=29.0), "in bf16"),
    (FLUX, change(OFFLOADED, host_peak_gb=1.951), "host memory"),
    (FLUX, change(NF4, run_peak_gb=None), "no run_peak_gb"),
    (FLUX, change(NF4, torch="2.13.0+cpu"), "another torch"),
    (FLUX, change(NF4, driver=None), "no driver"),
    (FLUX, change(NF4, seed=1), "another seed"),
    (FLUX, change(NF4, steps=20), "another steps"),
    (FLUX, change(NF4, frames=81), "another frames"),
    (FLUX, change(NF4, date="2026-11-31"), "no date"),
    (FLUX, change(NF4, date="2062-11-22"), "nothing was measured"),
    (FLUX, change(NF4, name="nf4, resident, eagre"), "no such combination"),
    (FLUX, change(NF4, name="bf16, resident, eager"), "twice"),
    (FLUX, change(NF4, latency=4.2), "unknown field"),
    (FLUX, lambda rows: rows[1]["call"].update(height=512), "called with another height"),
    (FLUX, lambda rows: [row.update(model="wan", frames=81) for row in rows], "file's name"),
    (FLUX, change(NF4, latency_s=None, step_ms=None, latencies_s=None), "no failure"),
    (WAN, change("recipe 1", latency_s=13.0), "it failed and has"),
    (WAN, change("recipe 1", failure="recipe 1"), "no sentence"),
    (POCKET, change(NF4, distance=0.2), "distance 0.2"),
    (POCKET, change(COMPILED, distance=2.4), "distance 2.4"),
    (POCKET, change(COMPILED, run_peak_gb=2.4), "without an accelerator"),
    (CITED, change(1, source="a friend"), "no source"),
    (CITED, change(1, load_s=3.0), "not cited"),
    (LIMITS, change(2, fits=True), "fits is True"),
    (LIMITS, change(3, call_s=None), "fits is True"),
    (LIMITS, change(3, reserved_gb=7.0), "7.0 reserved"),
    (LIMITS, change(3, program="10 GB"), "no such program"),
    (LIMITS, change(3, program="draw.py", allocated_gb=0.0), "0.0 GB allocated"),
    (SLOW_BUS, change(2, step_ms=90.0), "a step of 90 ms"),
    (SLOW_BUS, change(2, step_ms=900.0), "a step of 900 ms"),
    (SLOW_BUS, change(2, resident_ms=100.0), "another resident_ms"),
    (SLOW_BUS, change(2, copies=1), "twice"),
    (LIMITS, change(4, expandable_segments=False), "twice"),
    (COPIES, change(1, **{"first run GB/s": 5.38}), "order"),
    (COPIES, change(1, date="2026-11-23 to 2026-11-42"), "no date"),
    (ACTIVITY, span, "not in order"),
    (ACTIVITY, lambda rows: next(iter(rows[0]["recordings"].values())).pop("compute"), "has ["),
]


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_a_break_is_found(number):
    file, break_it, word = BREAKS[number]
    rows = copy.deepcopy(rows_of(file))
    break_it(rows)
    assert any(word in problem for problem in problems_of(file, rows)), problems_of(file, rows)


@pytest.mark.parametrize("card", ["draw.py", "draw.py --compile", "save_nf4.py --device cuda"])
def test_programs_that_a_reader_takes_home_have_rows(card):
    rows = rows_of(LIMITS)
    change(3, program=card)(rows)
    assert problems_of(LIMITS, rows) == []

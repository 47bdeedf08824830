"""The start page: what it says of a machine, its card finder, and its words."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import pytest

from helpers import checks, cpu_backend, devices, finder, machine, plan, predict, shapes
from helpers.cards import usual_card
from helpers.errors import TutorialError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
GB = 1e9


def cells(name):
    return json.loads((NOTEBOOKS / name).read_text("utf-8"))["cells"]


def lines():
    return {line["what"]: line for line in machine.check_machine()}


def test_every_line_says_whether_it_is_enough_and_what_to_do_if_not():
    found = lines()
    assert list(found) == [
        "accelerator", "memory of it", "host memory", "disk", "versions", "compiler", "Hub token"
    ]  # fmt: skip
    for line in found.values():
        assert line["here"] and (line["enough"] == "yes") == (line["what to do"] == "")


def fail(*_):
    raise TutorialError("do this")


@pytest.mark.parametrize(
    ("patch", "what", "enough", "do"),
    [
        ((checks, "check_versions", fail), "versions", "no", "do this"),
        ((cpu_backend, "check_compiler", fail), "compiler", "no", "do this"),
        ((machine, "get_token", lambda: "token"), "Hub token", "yes", ""),
        ((machine, "get_token", lambda: None), "Hub token", "but for gated models", "hf auth login"),
        ((machine.shutil, "which", lambda name: name), "accelerator", "no", "install its CUDA build"),
        ((machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=30 * GB)), "disk", "for the pocket", "HF_HOME"),
        ((machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=0.5 * GB)), "disk", "no", "HF_HOME"),
        ((machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=99 * GB)), "disk", "yes", ""),
    ],
)
def test_what_is_missing_is_said(patch, what, enough, do, monkeypatch):
    monkeypatch.setattr(cpu_backend, "has_gpu", lambda: False)
    monkeypatch.setattr(devices, "accelerator", lambda: SimpleNamespace(type="cpu"))
    monkeypatch.setattr(*patch)
    line = lines()[what]
    assert line["enough"].startswith(enough) and do in line["what to do"]


def test_host_memory_that_is_enough_is_that_of_the_rows():
    rows = predict.load_recorded(finder.REPOSITORIES["wan22"], shapes.known_shapes()).rows
    beside = max(row.host_peak_gb - row.footprint_gb for row in rows if "streamed" in row.name)
    wan = shapes.known_shapes()[finder.REPOSITORIES["wan"]].weights / GB
    assert machine.FULL_HOST_GB - 1 < wan + beside <= machine.FULL_HOST_GB


@pytest.mark.parametrize(("free", "enough"), [(1, "no"), (10, "for the pocket models"), (60, "yes")])
def test_host_memory_counts_what_is_free(free, enough, monkeypatch):
    memory = SimpleNamespace(available=free * GB, total=64 * GB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    assert lines()["host memory"]["enough"] == enough


@pytest.mark.parametrize(
    ("free", "total", "enough"), [(23, 24, "yes"), (10, 24, "in part"), (4, 4, "for the pocket models")]
)
def test_memory_of_a_card(free, total, enough, monkeypatch):
    monkeypatch.setattr(devices, "has_memory_statistics", lambda: True)
    monkeypatch.setattr(machine.torch.accelerator, "get_memory_info", lambda: (free * GB, total * GB))
    assert machine._memory()["enough"] == enough


def test_the_table_says_what_the_plan_says():
    found = finder.rows()
    others = len({model for model, _ in finder.choices()} - {finder.REPOSITORIES[model] for model in finder.LESSONS})
    assert len(found) == 2 * len(finder.CARDS_GB) + others * len(finder.FEW_GB)
    for row, (model, gb) in zip(found, finder.choices(), strict=True):
        made = plan.find_plan(plan.Request(model, gb, finder.RAM_GB, usual_card(gb)))
        name, draw, *figures = row.values()
        assert usual_card(gb) in name and made.lines[-1].endswith(f'" {draw}') and not made.problem
        assert set(figures) <= {figure.text.removesuffix(" reserved") for figure in made.figures.values()}


def test_only_models_with_rows_are_in_the_table(monkeypatch):
    monkeypatch.setattr(
        finder, "load_recorded", lambda path, _: SimpleNamespace(rows=["FLUX.1" in path] * ("FLUX" in path))
    )
    assert {model for model, _ in finder.choices()} == {finder.REPOSITORIES[model] for model in ("flux", "klein")}
    assert sum("klein" in model for model, _ in finder.choices()) == len(finder.FEW_GB)


def test_no_form_is_stored_where_nobody_looks(monkeypatch):
    for name in finder.LIVE:
        monkeypatch.delenv(name, raising=False)
    assert finder.form() is None


def test_the_form_answers_what_is_chosen(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "00_start_here.ipynb")
    form = finder.form()
    model, card, ram, answer = form.children
    assert set(model.options) == set(finder.REPOSITORIES.values())
    assert isinstance(form, ipywidgets.VBox) and "--memory-gb 11" in answer.value
    card.value = 8
    assert "--memory-gb 7" in answer.value
    model.value, ram.value = finder.REPOSITORIES["wan"], 16
    assert re.search(r"Drawing takes 17\.\d GB of host memory, and 16 GB leave 14.5", answer.value)
    model.value = "no-model"
    assert "There is no folder" in answer.value


def test_words_of_lesson_1_mean_the_same_here():
    def words(name):
        (text,) = ["".join(cell["source"]) for cell in cells(name) if "| word |" in "".join(cell["source"])]
        return [line for line in text.splitlines() if line.startswith("| ")]

    here, there = words("00_start_here.ipynb"), words("01_quantize_and_compile.ipynb")
    assert len(there) > 1 and [line for line in here if line in there] == there


def test_the_page_is_short():
    text = sum(
        len("".join(cell["source"]).split()) for cell in cells("00_start_here.ipynb") if cell["cell_type"] == "markdown"
    )
    code = [cell for cell in cells("00_start_here.ipynb") if cell["cell_type"] == "code"]
    assert text <= 900 and sum(len("".join(cell["source"]).splitlines()) for cell in code) <= 80

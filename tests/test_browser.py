"""tools/browser.py as far as it needs no browser: how it ends where it cannot start, and what it compares."""

import browser
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output


def test_without_a_browser_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    assert browser.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("No browser is on PATH (chromium, ") and said.err.count("\n") == 1


def test_without_what_drives_the_browser_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(browser.shutil, "which", lambda name: name)
    monkeypatch.setattr(browser.importlib.util, "find_spec", lambda name: None)
    assert browser.main([]) == 2
    assert "make test-browser" in capsys.readouterr().err


def test_a_word_that_no_check_has(capsys):
    assert browser.main(["--only", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("No check has nothing in its name: there are lesson-00_start_here, ")


@pytest.mark.parametrize("found", browser.BROWSERS)
def test_any_of_the_browsers_will_do(found, monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: f"bin/{name}" if name == found else None)
    assert browser.find_browser() == f"bin/{found}"


def test_a_failure_is_a_line_and_the_others_go_on(capsys):
    def fail(*_):
        raise browser.Failed("it is dark\nin here")

    checks = {"first": fail, "second": lambda *_: "two of them"}
    assert browser.run_checks(checks, None, "", (browser.Failed,)) == ["first"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("first  FAILED  ") and first.endswith("  it is dark")
    assert second.startswith("second  passed  ") and second.endswith("  two of them")


def test_of_many_problems_a_few_are_named():
    browser.fail_if([])
    with pytest.raises(browser.Failed, match=r"^0; 1; 2; 3; 4; and 2 more$"):
        browser.fail_if([str(number) for number in range(7)])


@pytest.mark.parametrize(
    ("first", "second", "ratio"),
    [
        ([0, 0, 0], [255, 255, 255], 21),
        ([118, 118, 118], [255, 255, 255], 4.54),  # the lightest grey that WCAG allows on white
        ([255, 0, 0], [255, 0, 0], 1),
    ],
)
def test_contrast(first, second, ratio):
    assert browser.contrast(first, second) == pytest.approx(browser.contrast(second, first))
    assert browser.contrast(first, second) == pytest.approx(ratio, abs=0.01)


def test_pictures_and_clips_are_counted():
    both = new_output("execute_result", data={"image/png": "", "image/jpeg": "", "text/plain": ""})
    clip = new_output("execute_result", data={"text/html": "<video controls>"})
    cells = [new_code_cell(outputs=[both, clip]), new_code_cell(outputs=[new_output("stream", text="<video ")])]
    assert browser.count_pictures(new_notebook(cells=cells)) == 2
    stored = [nbformat.read(path, as_version=4) for path in sorted(browser.NOTEBOOKS.glob("*.ipynb"))]
    assert all(map(browser.count_pictures, stored))

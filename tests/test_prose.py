"""The figures in the prose are the recorded ones, and a changed or a new one is noticed."""

import prose_checks
import pytest

DOCUMENTS = [document for document in prose_checks.PIECES if document != "every document"]


def test_every_document_is_read():
    notebooks = {path.name for path in prose_checks.NOTEBOOKS.glob("*.ipynb")}
    assert set(DOCUMENTS) == {"README.md", *notebooks}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_are_the_recorded_ones(document):
    problems = prose_checks.problems(document, prose_checks.texts(document))
    assert not problems, "\n".join(problems)


PIECES = {
    "recorded": ['{flux["recipe 2"].first_call_s:.0f} s for the first call', "it takes {fraction(0.34)} of the call"],
    "given": ["a card of 10 GB"],
}
GOOD = "With a card of 10 GB it is quick. Count 86 s for the first call. Then it takes a third of the call."


def problems(text, monkeypatch):
    monkeypatch.setitem(prose_checks.PIECES, "a.ipynb", PIECES)
    return prose_checks.problems("a.ipynb", [text])


def test_good_prose_passes(monkeypatch):
    assert problems(GOOD, monkeypatch) == []
    versions = " diffusers 0.42, PCIe 4.0, Wan2.1, FLUX.1-dev, 1024x1024, lesson 2, sections 4 and 5, 28 steps, 3 s1"
    assert problems(GOOD + prose_checks.PACKAGE.sub("", versions), monkeypatch) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "86 s",
            "68 s",
            "a.ipynb: 'Count 68 s for the first call' says 68, recorded is 86 (flux[\"recipe 2\"].first_call_s)",
        ),
        ("a third", "half", "says half, recorded is a third"),
        ("86 s for the first", "86 s for a first", "has no such text any more"),
        ("10 GB", "11 GB", "where does '11' come from"),
        ("quick.", "quick, 40% quicker.", "where does '40' come from"),
        ("quick.", "quick, 2.5 times.", "where does '2.5' come from"),
        ("quick.", "quick, 7 in place of 18.", "where does '18' come from"),
        ("quick.", "quick, 10 to 15 ms.", "where does '10' come from"),
        ("quick.", "quick: 1,500 GB/s.", "where does '1,500' come from"),
    ],
)
def test_a_break_is_noticed_and_named(old, new, expected, monkeypatch):
    assert any(expected in problem for problem in problems(GOOD.replace(old, new), monkeypatch))


def test_code_and_links_are_no_prose(tmp_path, monkeypatch):
    monkeypatch.setattr(prose_checks, "ROOT", tmp_path)
    tables = "| a | load (s) |\n|---|---|\n| b | 10.9 |\n\n| c | d |\n|---|---|\n| 4 GB | 1 |\n"
    prose = f"A `2.5 s` [link](a_9.9.md).\n```\n3 s\n```\n\n{tables}"
    (tmp_path / "README.md").write_text(prose)
    (text,) = prose_checks.texts("README.md")
    assert [match.group() for match in prose_checks.FIGURE.finditer(text)] == ["4"]

"""The web pages, on a tiny repository: what stands on them, that their links lead somewhere, what is said if not."""

import errno
import json
import os
import re
from pathlib import Path

import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_run_notebooks import PIXEL

from helpers.errors import TutorialError

README = """# The start

[One](notebooks/01_one.ipynb), [its end](notebooks/01_one.ipynb#2.-The-`end`-of-it), [two](notebooks/02_two.ipynb "2"),
[card](checkpoints/small/README.md#how-to), [figures][f], [results](benchmarks/results), [draw](programs/draw.py),
[`[x](no.md)`](LICENSE), `[y](no.md)`, [away](https://example.org/a), [here](#below).

<a href="notebooks/02_two.ipynb">two</a> <img src="checkpoints/small/dot.png" alt="a dot">

```
[not a link](no.md)
```

## Below

[f]: benchmarks/results/a_b.json
"""
CLIP = '<video controls width="9" >\n <source src="data:video/mp4;base64,AAAA" type="video/mp4">\n </video>'
ROWS = [
    {"name": "a | b", "load_s": 1.25, "device": "H1", "seed": 0, "call": {"x": 1}, "source": "https://example.org/a"},
    {"name": "c", "load_s": 2, "device": "H1", "seed": 0, "call": {"x": 1}, "source": "https://example.org/a"},
]


def tiny_notebook(*cells):
    return new_notebook(cells=[new_markdown_cell("# Title"), *cells])


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with one of each kind of page."""
    root = tmp_path_factory.mktemp("repository")
    for name, text in {
        "README.md": README,
        "README.zh.md": "# 开始\n\n[English](README.md)\n",
        "LICENSE": "free",
        "programs/draw.py": 'print("drawn")\n',
        "checkpoints/small/README.md": "---\nlicense: mit\n---\n\n# small\n\n## How to\n\n[up](../../README.md)\n",
        "benchmarks/results/a_b.json": json.dumps(ROWS),
        "benchmarks/results/c.json": "{}",
        "benchmarks/results/one.json": json.dumps(ROWS[:1]),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "checkpoints/small/dot.png").write_bytes(b"dot")
    picture = new_output("display_data", data={"image/png": PIXEL})
    widget = new_output("display_data", data={pages.WIDGET: {"model_id": "1"}, "text/plain": "a slider"})
    one = tiny_notebook(
        new_code_cell("import os  # on Colab", id="colab"),
        new_markdown_cell("## 1. A\n\nLook at the **first** [one](02_two.ipynb), `load_s`. It is small."),
        new_code_cell("first", outputs=[picture, widget]),
        new_code_cell("assert not 'for authors'[99:]", metadata={"tags": ["check"]}),
        new_markdown_cell("## 2. The `end` of it"),
        new_code_cell("second", outputs=[picture, new_output("execute_result", data={"text/html": CLIP})]),
        new_markdown_cell('The "second" one\nis small, too: look.'),
        new_code_cell("third", outputs=[new_output("stream", text="$ printed\n")]),
    )
    one.metadata["widgets"] = {"state": {}}
    (root / "notebooks").mkdir()
    nbformat.write(one, root / "notebooks" / "01_one.ipynb")
    nbformat.write(tiny_notebook(new_markdown_cell("[license](../LICENSE)")), root / "notebooks" / "02_two.ipynb")
    return root


@pytest.fixture(scope="module")
def site(repository):
    """The pages, built once; nothing is wrong with them."""
    target = repository / "build" / "site"
    assert pages.build(repository, pages.read_notebooks(repository / "notebooks"), target) == []
    return target


def test_each_page_is_there_and_nothing_else_is_left(site):
    names = ["01_one", "02_two", "README.zh", "draw", "index", "results", "search", "small"]
    assert sorted(path.stem for path in site.glob("*.html")) == names
    assert [path.name for path in site.iterdir() if path.name.startswith(".")] == []
    navigation = re.findall(r'class="reference internal" href="([\w.]+)"', (site / "search.html").read_text())
    assert navigation == [f"{names[place]}.html" for place in (0, 1, 3, 5, 7, 2)]


def test_links_lead_to_pages_sections_and_files(site):
    links = set(re.findall(r'href="([^"]*)"', (site / "index.html").read_text()))
    assert {"01_one.html", "01_one.html#the-end-of-it", "02_two.html", "small.html#how-to"} <= links
    assert {"results.html", "draw.html", "#below", "https://example.org/a"} <= links
    assert {Path(link).name for link in links if "_downloads" in link} == {"a_b.json", "LICENSE"}
    assert (site / "files/checkpoints/small/dot.png").read_bytes() == b"dot"
    assert 'href="index.html"' in (site / "small.html").read_text()


def test_a_notebook_without_its_checks_with_messages_for_pictures_and_clips(site):
    page = (site / "01_one.html").read_text()
    first, second = "Look at the first one, load_s.", "The &quot;second&quot; one is small, too: look."
    assert re.findall(r'<img alt="([^"]*)"', page) == [first, second]
    assert re.findall(r'<video aria-label="([^"]*)" controls', page) == [second]
    assert "data:video/mp4;base64,AAAA" in page and "$ printed" in page
    assert "for authors" not in page and "on Colab" not in page and "a slider" not in page and pages.WIDGET not in page


def test_each_picture_and_clip_of_the_lessons_has_a_message_of_its_own():
    messages = [
        pages.picture_message(notebook, index)
        for notebook in pages.read_notebooks(pages.ROOT / "notebooks").values()
        for index, cell in enumerate(notebook.cells)
        if re.search("image/png|<video", json.dumps(cell.get("outputs", [])))
    ]
    assert [text for text in messages if not re.fullmatch(r".{25,}[.!?]", text)] == []
    assert messages and len(set(messages)) == len(messages)


def test_code_is_copied_without_outputs_and_prompts(site):
    script = (site / "_static" / "copybutton.js").read_text()
    assert "div:not(.output) > div.highlight pre" in script and r">>> |\\.\\.\\. |\\$ |" in script
    assert "copybutton.js" in (site / "01_one.html").read_text()


def test_results_are_a_table_and_what_all_rows_share(site):
    page = (site / "results.html").read_text()
    text = re.sub(r"<[^>]*>", "", page)
    assert "a_b.json: device H1; seed 0; source https://example.org/a." in text
    assert "one.json: name a | b; load_s 1.25; device H1; seed 0; source https://example.org/a." in text
    assert re.findall(r"<t[hd][^>]*>(?:<p>)?(.*?)(?:</p>)?</t[hd]>", page) == [
        "name",
        "load_s",
        "a | b",
        "1.25",
        "c",
        "2.00",
    ]


def test_pages_fetch_nothing_from_the_network(site):
    """Scripts included: `dead_links`, which built with no complaint, reads the tags; this reads the code."""
    code = "\n".join(path.read_text() for path in site.rglob("*") if path.suffix in (".js", ".css"))
    assert not re.search(r"@import|url\(['\"]?(https?:)?//|import\(|(src|href) ?= ?['\"](https?:)?//", code)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    path = Path("notebooks/01_a.ipynb")
    notebook = tiny_notebook(new_markdown_cell("[a](02_b.ipynb) [b](../../c) [d](/etc/passwd) [e](../programs)"))
    (tmp_path / "programs").mkdir()
    problems = pages.Sources(tmp_path, {path: notebook}, tmp_path / "sources").problems
    assert problems == [
        f"{path} links to {link}, which is no page and no file of the repository."
        for link in ("02_b.ipynb", "../../c", "/etc/passwd", "../programs")
    ]


def test_the_links_of_this_repository_lead_somewhere(tmp_path):
    notebooks = pages.read_notebooks(pages.ROOT / "notebooks")
    assert notebooks and pages.Sources(pages.ROOT, notebooks, tmp_path / "sources").problems == []


@pytest.mark.parametrize(
    "tag, problem",
    [
        ('<a href="b.html#there">', None),
        ('<a href="b.html?q=1#there">', None),
        ('<a href="#">', None),
        ('<a href="mailto:a@example.org">', None),
        ('<a href="https://example.org">', None),
        ('<img alt="" src="data:image/png;base64,AA">', None),
        ('<a href="c.html">', "a.html links to c.html, which is not there."),
        ('<a href="../out.html">', "a.html links to ../out.html, which is not there."),
        ('<a href="b.html#nowhere">', "a.html links to b.html#nowhere: that page has no such place."),
        ('<a href="#nowhere">', "a.html links to #nowhere: that page has no such place."),
        ('<img alt="" src="no.png">', "a.html links to no.png, which is not there."),
        ('<img src="b.html">', "a.html has a picture with no description: b.html"),
        (
            '<script src="https://cdn.example.org/x.js">',
            "a.html fetches https://cdn.example.org/x.js from the network.",
        ),
        ('<link href="//fonts.example.org/x">', "a.html fetches //fonts.example.org/x from the network."),
    ],
)
def test_dead_links(tmp_path, tag, problem):
    folder = tmp_path / "pages"
    folder.mkdir()
    (tmp_path / "out.html").touch()
    (folder / "a.html").write_text(tag)
    (folder / "b.html").write_text('<p id="there">')
    assert pages.dead_links(folder) == ([problem] if problem else [])


def test_pages_that_cannot_be_built_or_written(tmp_path, monkeypatch):
    """One sentence, and nothing half-written stays."""
    notebooks = {Path("notebooks/01_a.ipynb"): tiny_notebook()}

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.html")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", refuse)
        patch.setattr(pages, "sphinx", fake_sphinx())
        with pytest.raises(
            TutorialError, match=r"^a.html cannot be written \(the disk is full\): free some space or name"
        ):
            pages.build(tmp_path, notebooks, tmp_path / "build")
    monkeypatch.setattr(
        pages, "sphinx", fake_sphinx(2, "x\nsphinx.errors.ConfigError: No such theme.\nPlease report.\n")
    )
    with pytest.raises(
        TutorialError, match=r"^The pages could not be built: sphinx.errors.ConfigError: No such theme\.$"
    ):
        pages.build(tmp_path, notebooks, tmp_path / "build")
    assert list((tmp_path / "build").iterdir()) == []


def fake_sphinx(status=0, said="", answers=(), page=""):
    """Writes one page, or the answers of the link check."""

    def sphinx(sources, target, builder="html"):
        target.mkdir(parents=True)
        (target / "index.html").write_text(page)
        if builder == "linkcheck":
            (target / "output.json").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        return pages.subprocess.CompletedProcess([], status, "", said)

    return sphinx


def test_main_names_what_is_wrong(repository, capsys, monkeypatch):
    arguments = ["--notebooks", str(repository / "notebooks"), "--build", str(repository / "build" / "other")]
    monkeypatch.setattr(pages, "sphinx", fake_sphinx(said="index.md:3: WARNING: something\n"))
    assert pages.main(arguments) == 1
    assert capsys.readouterr().err == "index.md:3: WARNING: something\n"
    monkeypatch.setattr(pages, "sphinx", fake_sphinx(page='<a href="no.html">'))
    assert pages.main(arguments) == 1
    assert capsys.readouterr().err == "index.html links to no.html, which is not there.\n"
    monkeypatch.setattr(pages, "sphinx", fake_sphinx())
    assert pages.main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"Open {repository}/build/other/index.html in a browser.\n")

    page = {"filename": "a.md", "uri": "https://example.org/a"}
    answers = [page | {"status": "working", "info": ""}, page | {"status": "broken", "info": "404"}]
    monkeypatch.setattr(pages, "sphinx", fake_sphinx(answers=answers))
    assert pages.main([*arguments, "--links"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "a.md links to https://example.org/a: 404\n"
    assert printed.out == "1 without an answer.\n"
    monkeypatch.setattr(pages, "sphinx", fake_sphinx(answers=answers[:1]))
    assert pages.main([*arguments, "--links"]) == 0

"""Each static check passes a good notebook and finds each of its faults in a broken one."""

import nbformat
import notebook_checks
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


def good_notebook():
    """Two code cells among three text cells, as stored after a run."""
    return new_notebook(
        metadata={
            "kernelspec": dict(notebook_checks.KERNEL),
            "language_info": notebook_checks.LANGUAGE | {"version": "3.12.1"},
        },
        cells=[
            new_markdown_cell(
                "# Title\n\n## 1. The *one* part\n\n"
                "Read section 1, the [sanitize file](nbval_sanitize.cfg), "
                "[lesson 1](01_quantize_and_compile.ipynb#1.-Set-up), section 2, "
                "([a paper, section 9](https://example.org)), "
                "`a[0](1)` or https://example.org/tmp/."
            ),
            new_code_cell(
                "x = 1\nx", execution_count=1, outputs=[result("1"), result(page("ab", "cd", "ef"), "text/html")]
            ),
            new_markdown_cell("Text.\n\n```python\n# a comment, no title\n```"),
            new_code_cell("assert x == 1", execution_count=2, metadata={"tags": ["nbval-ignore-output"]}),
            new_markdown_cell("The end."),
        ],
    )


CHECK = {"tags": ["check"], "jupyter": {"source_hidden": True}}


def result(text, kind="text/plain"):
    return new_output("execute_result", {kind: text}, execution_count=1)


def page(*rows):
    return "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)


def error():
    return new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])


def code(notebook):
    return notebook.cells[1]


# Each breaks a good notebook in one way. The key names the check and the fault.
BREAKS = {
    "format: unknown cell type": lambda n: n.cells[0].update(cell_type="poem"),
    "metadata: other kernel": lambda n: n.metadata.kernelspec.update(name="venv-of-mine"),
    "metadata: other display name": lambda n: n.metadata.kernelspec.update(display_name="venv-of-mine"),
    "metadata: no kernel": lambda n: n.metadata.pop("kernelspec"),
    "metadata: no language": lambda n: n.metadata.pop("language_info"),
    "metadata: language by its name only": lambda n: n.metadata.update(language_info={"name": "python"}),
    "metadata: older format": lambda n: n.update(nbformat_minor=4),
    "metadata: key of an editor": lambda n: n.metadata.update(vscode={}),
    "metadata: times of a run": lambda n: code(n).metadata.update(execution={}),
    "executed: not run": lambda n: code(n).update(execution_count=None),
    "executed: out of order": lambda n: code(n).update(execution_count=3),
    "executed: empty cell": lambda n: code(n).update(source=" \n"),
    "executed: error": lambda n: code(n).outputs.append(error()),
    "executed: meant error missing": lambda n: code(n).metadata.update(tags=["raises-exception"]),
    "widgets: state": lambda n: n.metadata.update(widgets={}),
    "widgets: view": lambda n: code(n).outputs.append(result({}, notebook_checks.WIDGET)),
    "size: picture too large": lambda n: code(n).outputs.append(result("a" * 1_000_000, "image/png")),
    "plain_python: line magic": lambda n: code(n).update(source="%time x = 1"),
    "plain_python: cell magic": lambda n: code(n).update(source="%%time\nx = 1"),
    "plain_python: assigned magic": lambda n: code(n).update(source="x = %pwd"),
    "plain_python: shell": lambda n: code(n).update(source="!ls"),
    "plain_python: help": lambda n: code(n).update(source="len?"),
    "plain_python: pip by automagic": lambda n: code(n).update(source="pip install x"),
    "plain_python: get_ipython": lambda n: code(n).update(source="get_ipython().system('ls')"),
    "title: none": lambda n: n.cells[0].update(source="## Title"),
    "title: two": lambda n: n.cells[2].update(source="# Second"),
    "title: two, in HTML": lambda n: n.cells[2].update(source="<h1>Second</h1>"),
    "title: not first": lambda n: n.cells.insert(0, new_markdown_cell("Hello.")),
    "headings: one left out": lambda n: n.cells[4].update(source="#### The end"),
    "headings: none of the first level": lambda n: n.cells[0].update(source="## Title"),
    "colours: of an argument": lambda n: code(n).update(source='plot(color="#00FF00")'),
    "colours: one of several": lambda n: code(n).update(source='plot(colors=["black", "C1"])'),
    "colours: of a chart in text": lambda n: n.cells[2].update(source="Copies (green) take long."),
    "colours: of a dictionary": lambda n: code(n).update(source='plot(**{"facecolor": "red"})'),
    "lengths: one long cell": lambda n: code(n).update(source="x = 1\n" * 26),
    "lengths: all rather long": lambda n: [cell.update(source="x = 1\n" * 9) for cell in (n.cells[1], n.cells[3])],
    "balance: little text": lambda n: n.cells.extend(new_code_cell("x") for _ in range(3)),
    "balance: little code": lambda n: n.cells.extend(new_markdown_cell("x") for _ in range(2)),
    "balance: no code": lambda n: n.update(cells=[n.cells[0]]),
    "frame: code comes first": lambda n: n.cells.pop(0),
    "frame: code comes last": lambda n: n.cells.pop(),
    "paths: in code": lambda n: code(n).update(source="open('/home/me/x')"),
    # Put together, so that no path of a machine stands in this file.
    "paths: in text": lambda n: n.cells[2].update(source="See " + "/".join(["", "root", "x."])),
    "paths: in a result": lambda n: code(n).outputs.append(result("Path('/tmp/x')")),
    "paths: of Windows": lambda n: code(n).outputs.append(result("C:\\Users\\me")),
    "paths: printed": lambda n: code(n).outputs.append(new_output("stream", name="stdout", text="at /srv/x")),
    "paths: in a traceback": lambda n: code(n).outputs.append(error() | {"traceback": ["File /home/me/a.py:1"]}),
    "noise: pages of a result": lambda n: code(n).outputs.append(result("Layer()\n" * 41)),
    "noise: pages of a print": lambda n: code(n).outputs.append(new_output("stream", name="stdout", text="x\n" * 41)),
    "noise: pages of a table": lambda n: code(n).outputs.append(result(page(*["ab", "cd"] * 21), "text/html")),
    "noise: stderr": lambda n: code(n).outputs.append(new_output("stream", name="stderr", text="Warning\n")),
    "tables: wide": lambda n: code(n).outputs.append(result(page(["a"] * 7, ["b"] * 7), "text/html")),
    "tables: constant column": lambda n: code(n).outputs.append(result(page("ab", "cd", "ed"), "text/html")),
    "tables: empty": lambda n: code(n).outputs.append(result(page("ab"), "text/html")),
    "tags: skipped cell": lambda n: code(n).metadata.update(tags=["nbval-skip"]),
    "tags: misspelt": lambda n: code(n).metadata.update(tags=["nbval-ignore"]),
    "tags: marker in a comment": lambda n: code(n).update(source="# NBVAL_SKIP\nx"),
    "tags: ignored and no assert": lambda n: n.cells[3].update(source="x  # assert"),
    "tags: a check that asserts nothing": lambda n: n.cells[3].update(source="x", metadata=CHECK),
    "tags: a check that is not folded": lambda n: n.cells[3].metadata.update(tags=["check"]),
    "details: blank line": lambda n: n.cells[2].update(source="<details><summary>S</summary>\n\nx\n</details>"),
    "links: file missing": lambda n: n.cells[2].update(source="[next](99_none.ipynb#part)"),
    "links: picture missing": lambda n: n.cells[2].update(source='<img src="none.png">'),
    "links: reference missing": lambda n: n.cells[2].update(source="See [it].\n\n[it]: none.md"),
    "links: within the page": lambda n: n.cells[2].update(source="See [section 2](#2.-More)."),
    "links: absolute": lambda n: n.cells[2].update(source="[it](/etc/passwd)"),
    "links: section missing": lambda n: n.cells[2].update(source="[it](#2.-The-other-part)"),
    "links: section of another notebook": lambda n: n.cells[2].update(
        source="[it](01_quantize_and_compile.ipynb#1.-Set)"
    ),
    "sections: none of that number": lambda n: n.cells[2].update(source="As in section 2."),
    "sections: one of several": lambda n: n.cells[2].update(source="As in sections 1 and\n7."),
    "sections: in a comment": lambda n: code(n).update(source="x = 1  # section 4 says why"),
    "sections: of another lesson": lambda n: n.cells[2].update(source="As in [lesson 1](a.ipynb), section 40."),
    "sections: of another lesson, after": lambda n: n.cells[2].update(source="As in section 40 of lesson 1."),
    "sections: of no lesson": lambda n: n.cells[2].update(source="As in lesson 9, section 1."),
    "sections: a number left out": lambda n: n.cells[2].update(source="## 3. The third"),
    "fps: another": lambda n: code(n).update(source='export_to_video(list(clip), "a.mp4", fps=8)'),
    "fps: none": lambda n: code(n).update(source='utils.export_to_video(clip, "a.mp4")'),
    "fps: in a program to copy": lambda n: n.cells[2].update(
        source='```python\nx = 1\nexport_to_video(x, "a.mp4", fps=8)\n```'
    ),
    "environment: another version": lambda n: code(n).update(
        source="devices.environment()", outputs=[result("torch 1.0.0")]
    ),
    "ruff: unused import": lambda n: code(n).update(source="import os"),
    "ruff: unknown name": lambda n: code(n).update(source="pwd"),
    "ruff: not formatted": lambda n: code(n).update(source="x=1"),
}


@pytest.mark.parametrize("check", notebook_checks.CHECKS, ids=lambda check: check.__name__)
def test_good_notebook_passes(check):
    assert check(good_notebook()) == []


@pytest.mark.parametrize("fault", BREAKS)
def test_fault_is_found(fault):
    notebook = good_notebook()
    BREAKS[fault](notebook)
    check = getattr(notebook_checks, "check_" + fault.split(":")[0])
    problems = check(nbformat.from_dict(notebook))
    assert problems and all(isinstance(problem, str) for problem in problems)


def test_every_check_is_broken_once():
    assert {f"check_{fault.split(':')[0]}" for fault in BREAKS} == {check.__name__ for check in notebook_checks.CHECKS}


def test_meant_error_passes():
    notebook = good_notebook()
    code(notebook).metadata.tags = ["raises-exception"]
    code(notebook).outputs = [error()]
    assert notebook_checks.check_executed(notebook) == []


def test_a_folded_check_right_after_a_cell_counts_as_its_assert():
    notebook = good_notebook()
    notebook.cells[3].update(source="x")
    notebook.cells.insert(4, new_code_cell("assert x == 1", metadata=CHECK))
    assert notebook_checks.check_tags(notebook) == []


def test_encoded_picture_is_no_path():
    notebook = good_notebook()
    picture = '<img src="data:image/png;base64,AAAA+/tmp/AAAA=">'
    code(notebook).outputs = [result(picture, "text/html"), result("/tmp/AAAA", "image/png")]
    assert notebook_checks.check_paths(notebook) == []


def test_an_environment_with_the_pins_passes():
    notebook = good_notebook()
    pins = (notebook_checks.ROOT / "requirements.txt").read_text()
    code(notebook).update(source="devices.environment()", outputs=[result(pins)])
    assert notebook_checks.check_environment(notebook) == []


def test_sixteen_frames_per_second_pass():
    notebook = good_notebook()
    code(notebook).source = 'export_to_video(list(clip), "a.mp4", fps=16)'
    assert notebook_checks.check_fps(notebook) == []


def test_links_of_markdown_files(tmp_path):
    (tmp_path / "a.md").write_text("# A: the `title`!\n\n```\n# no heading\n```\n")
    good = "[a](a.md) [b](a.md#a-the-title) [c](#own) [d](https://example.org/#x)"
    assert notebook_checks.broken_links(good, tmp_path, ["own"]) == []
    for bad in ("[a](b.md)", "[a](a.md#title)", "[a](a.md#no-heading)", "[a](#title)", '<img src="a.png">'):
        assert len(notebook_checks.broken_links(bad, tmp_path, ["own"])) == 1, bad


def test_a_digest_is_of_code_and_outputs():
    before = notebook_checks.digest(good_notebook())
    assert notebook_checks.digest(good_notebook()) == before
    for change in (
        lambda n: n.cells[3].outputs.append(result("0.23")),
        lambda n: code(n).outputs[0].data.update({"text/plain": "2"}),
        lambda n: code(n).update(source="x = 2\nx"),
    ):
        notebook = good_notebook()
        change(notebook)
        assert notebook_checks.digest(notebook) != before

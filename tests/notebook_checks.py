"""Static checks of one notebook, as stored. Each takes the notebook and returns sentences, one for each problem.

`CHECKS` lists them. They read the file and execute nothing: nbval does that. What nbval does not compare, pictures and
the outputs of cells tagged nbval-ignore-output, has a digest. After a run that changes what the notebooks store:

    python tests/notebook_checks.py
"""

import ast
import hashlib
import json
import re
import statistics
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

MAX_BYTES = 1_000_000
MAX_CELL_LINES = 25
MAX_MEDIAN_LINES = 8
MAX_OUTPUT_LINES = 40
TEXT_PER_CODE = (2 / 3, 2)  # text cells for each code cell
DIGESTS = Path(__file__).parent / "stored_outputs.txt"
FPS = 16  # Wan2.1 draws 16 frames for each second

# What nbval knows and the design allows. A skipped cell is a cell that nobody tests.
TAGS = {"nbval-ignore-output", "raises-exception", "check"}
WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|work|tmp|Users|mnt|media|opt|srv|var)/\S*|\b[A-Z]:\\\w\S*")
# What JupyterLab writes, and so what it leaves alone: in another form a notebook is unsaved as soon as it opens. The
# version of Python is that of whoever ran it last.
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
MAX_COLUMNS = 6
LINK = re.compile(r"\]\(<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)", re.MULTILINE)

HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# "section 6", "sections 4, 5 and 8", and where it is: "lesson 2, section 4", "section 6 of lesson 2".
SECTION = re.compile(
    r"(?:lesson (?P<before>\d)(?:\]\([^)]*\))?(?:, |'s )|(?P<paper>\[[^\]]*))?"
    r"\b[Ss]ection(?P<numbers> \d+|s \d+(?:(?:, | and | or | to )\d+)*)"
    r"(?: of \[?lesson (?P<after>\d))?"
)


def check_format(notebook: NotebookNode) -> list[str]:
    """The file is a valid notebook."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"The notebook is not valid: {str(error).splitlines()[0]}"]
    return []


def check_metadata(notebook: NotebookNode) -> list[str]:
    """Metadata as JupyterLab writes it, and none that differs between machines besides the version of Python."""
    problems = []
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        problems.append(f"The format must be 4.5, and is {notebook.nbformat}.{notebook.nbformat_minor}.")
    kernel, language = (notebook.metadata.get(key, {}) for key in ("kernelspec", "language_info"))
    if kernel != KERNEL:
        problems.append(f"The kernelspec must be {KERNEL}, and is {dict(kernel)}.")
    if not language.get("version", "").startswith("3.") or language != LANGUAGE | {"version": language["version"]}:
        problems.append(f"language_info must be {LANGUAGE} and the version of Python, and is {dict(language)}.")
    for key in sorted(set(notebook.metadata) - {"kernelspec", "language_info", "widgets"}):
        problems.append(f"The notebook's metadata has '{key}': remove it.")
    for index, cell in enumerate(notebook.cells):
        for key in sorted(set(cell.metadata) - {"tags", "jupyter"}):
            problems.append(f"{name(index, cell)} has the metadata '{key}': remove it.")
    return problems


def check_executed(notebook: NotebookNode) -> list[str]:
    """Every code cell was executed, in order, from a fresh kernel. Errors are stored where meant, only there."""
    problems = []
    for number, (index, cell) in enumerate(code_cells(notebook), start=1):
        if not cell.source.strip():
            problems.append(f"{name(index, cell)} is empty: remove it.")
        if cell.execution_count != number:
            problems.append(
                f"{name(index, cell)} has the number {cell.execution_count}, not {number}: run all, in order."
            )
        failed = any(output.output_type == "error" for output in cell.outputs)
        meant = "raises-exception" in tags(cell)
        if failed and not meant:
            problems.append(f"{name(index, cell)} stores an error.")
        if meant and not failed:
            problems.append(f"{name(index, cell)} is tagged raises-exception and stores no error.")
    return problems


def check_widgets(notebook: NotebookNode) -> list[str]:
    """No widgets: they show nothing outside a live kernel, and their ids change with every run."""
    problems = []
    if "widgets" in notebook.metadata:
        problems.append("The notebook's metadata stores widget state.")
    for index, cell in code_cells(notebook):
        if any(WIDGET in output.get("data", {}) for output in cell.outputs):
            problems.append(f"{name(index, cell)} stores a widget.")
    return problems


def check_size(notebook: NotebookNode) -> list[str]:
    """The file stays small."""
    size = len(nbformat.writes(notebook).encode())
    return [f"The notebook has {size} bytes; {MAX_BYTES} are allowed."] if size > MAX_BYTES else []


def check_plain_python(notebook: NotebookNode) -> list[str]:
    """Each code cell is plain Python, which a script runs as well: no magics, no shell lines, no get_ipython."""
    problems = []
    for index, cell in code_cells(notebook):
        tree = parse(cell.source)
        if tree is None:
            problems.append(f"{name(index, cell)} is not plain Python: no magics, no shell lines.")
        elif any(isinstance(node, ast.Name) and node.id == "get_ipython" for node in ast.walk(tree)):
            problems.append(f"{name(index, cell)} calls get_ipython: a script has none.")
    return problems


def check_title(notebook: NotebookNode) -> list[str]:
    """Exactly one H1, and it comes first."""
    titles = [
        (index, line)
        for index, cell in text_cells(notebook)
        for line in without_code(cell.source).splitlines()
        if re.match(r"\s{0,3}#\s|.*<h1", line)
    ]
    problems = []
    if len(titles) != 1:
        problems.append(f"The notebook has {len(titles)} H1, not one: {[line for _, line in titles]}.")
    if (
        not notebook.cells
        or not re.match(r"#\s", notebook.cells[0].source)
        or notebook.cells[0].cell_type != "markdown"
    ):
        problems.append("The notebook does not begin with its H1.")
    return problems


def check_lengths(notebook: NotebookNode) -> list[str]:
    """Code cells are short: a reader sees one without scrolling."""
    lengths = [(index, cell, len(cell.source.splitlines())) for index, cell in code_cells(notebook)]
    problems = [
        f"{name(index, cell)} has {length} lines; {MAX_CELL_LINES} are allowed."
        for index, cell, length in lengths
        if length > MAX_CELL_LINES
    ]
    median = statistics.median([length for *_, length in lengths] or [0])
    if median > MAX_MEDIAN_LINES:
        problems.append(f"The median code cell has {median:g} lines; {MAX_MEDIAN_LINES} are allowed.")
    return problems


def check_balance(notebook: NotebookNode) -> list[str]:
    """About as many text cells as code cells that are no checks, and at least one of each."""
    text = len(list(text_cells(notebook)))
    code = sum("check" not in tags(cell) for _, cell in code_cells(notebook))
    low, high = TEXT_PER_CODE
    if not code or not low <= text / code <= high:
        return [f"The notebook has {text} text cells and {code} code cells: about as many of each are wanted."]
    return []


def check_frame(notebook: NotebookNode) -> list[str]:
    """Text comes before the first code cell and after the last."""
    problems = []
    kinds = [cell.cell_type for cell in notebook.cells]
    if "code" in kinds and "markdown" not in kinds[: kinds.index("code")][-1:]:
        problems.append("No text comes right before the first code cell.")
    if kinds[-1:] != ["markdown"]:
        problems.append("The notebook does not end with text.")
    return problems


def check_paths(notebook: NotebookNode) -> list[str]:
    """No absolute path of a machine, neither in sources nor in outputs."""
    problems = []
    for index, cell in enumerate(notebook.cells):
        for where, text in [("source", cell.source), *(("output", text) for text in output_texts(cell))]:
            for path in sorted(set(MACHINE_PATH.findall(text))):
                problems.append(f"{name(index, cell)} has a path of one machine in its {where}: {path}")
    return problems


def check_noise(notebook: NotebookNode) -> list[str]:
    """No output that a reader has no use for: nothing on stderr, nothing pages long, such as the layers of a model."""
    problems = []
    for index, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"{name(index, cell)} prints on stderr: {output.text.strip().splitlines()[:1]}")
        # A row of a table is many lines of HTML.
        lines = max((text.count("<tr") or len(text.splitlines()) for text in output_texts(cell)), default=0)
        if lines > MAX_OUTPUT_LINES:
            problems.append(f"{name(index, cell)} has an output of {lines} lines; at most {MAX_OUTPUT_LINES} are read.")
    return problems


def check_tables(notebook: NotebookNode) -> list[str]:
    """Tables are narrow, and each column of one with several rows says something: it is not constant."""
    problems = []
    for index, cell in code_cells(notebook):
        for page in (output.get("data", {}).get("text/html", "") for output in cell.outputs):
            rows = [
                re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)
            ]
            if any(len(row) > MAX_COLUMNS for row in rows):
                problems.append(f"{name(index, cell)} has a table of more than {MAX_COLUMNS} columns.")
            if len(rows) == 1:
                problems.append(f"{name(index, cell)} has a table with nothing in it.")
            for heading, *column in zip(*rows, strict=True) if len(rows) > 2 else ():
                if len(set(column)) == 1:
                    problems.append(f"{name(index, cell)} has a table whose column {heading} is constant.")
    return problems


def check_tags(notebook: NotebookNode) -> list[str]:
    """Only known tags, no markers in comments, and an assert wherever the output is not compared.

    The assert is in the cell itself, or in a folded cell tagged check, which comes right after it.
    """
    problems = []
    for index, cell in enumerate(notebook.cells):
        for tag in sorted(tags(cell) - TAGS):
            problems.append(f"{name(index, cell)} has the tag '{tag}'; allowed are {sorted(TAGS)}.")
        if cell.cell_type != "code":
            continue
        if re.search(r"^\s*#+\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.MULTILINE):
            problems.append(f"{name(index, cell)} has an nbval marker in a comment: use a tag.")
        after = notebook.cells[index + 1 : index + 2]
        checked = asserts(cell) or any("check" in tags(other) and asserts(other) for other in after)
        if "nbval-ignore-output" in tags(cell) and not checked:
            problems.append(f"{name(index, cell)} is tagged nbval-ignore-output and asserts nothing.")
        if "check" in tags(cell) and not (asserts(cell) and cell.metadata.get("jupyter", {}).get("source_hidden")):
            problems.append(f"{name(index, cell)} is tagged check: it must assert, and be folded (source_hidden).")
    return problems


def check_headings(notebook: NotebookNode) -> list[str]:
    """No level of heading is left out."""
    return skipped_levels("\n\n".join(cell.source for _, cell in text_cells(notebook)))


def check_colours(notebook: NotebookNode) -> list[str]:
    """No colour is typed: those of helpers.charts are tried for colour-blind readers and for grey print.

    And text names what is in a chart by its label, not by a colour in parentheses.
    """
    problems = [
        f"{name(index, cell)} names {colour}, a colour: name the label in the chart."
        for index, cell in text_cells(notebook)
        for colour in re.findall(r"\((?:blue|red|yellow|green|orange|purple|black|grey)\)", cell.source)
    ]
    for index, cell in code_cells(notebook):
        for node in ast.walk(parse(cell.source) or ast.Module([], [])):
            pairs = [(node.arg, node.value)] if isinstance(node, ast.keyword) else []
            if isinstance(node, ast.Dict):
                pairs = [(ast.unparse(key), value) for key, value in zip(node.keys, node.values, strict=True) if key]
            for key, value in pairs:
                parts = (part.value for part in ast.walk(value) if isinstance(part, ast.Constant))
                typed = {part for part in parts if isinstance(part, str)} - {"black", "white", "none"}
                if typed and re.fullmatch(r"c|cmap|.*colou?rs?", str(key).strip("'")):
                    problems.append(f"{name(index, cell)} has the colour {min(typed)}: take one of charts.COLOURS.")
    return problems


def check_links(notebook: NotebookNode, folder: Path = NOTEBOOKS) -> list[str]:
    """Each link in text leads to a file of the repository, or to a section of another notebook; none to its own page.

    JupyterLab renders what is above such a section late, and stops at a wrong place.
    """
    problems = []
    for index, cell in text_cells(notebook):
        for groups in LINK.findall(without_code(cell.source)):
            link = "".join(groups)
            if link.startswith("#"):
                problems.append(f"{name(index, cell)} links to {link} of its own page: write the section's number.")
        problems += [
            f"{name(index, cell)} {problem}" for problem in broken_links(cell.source, folder, anchors(notebook))
        ]
    return problems


def check_sections(notebook: NotebookNode, folder: Path = NOTEBOOKS) -> list[str]:
    """A section that the text or a comment names ("section 6", "lesson 2, section 4") is there, and numbers run on."""
    own = section_numbers(notebook)
    problems = [] if own == list(range(1, len(own) + 1)) else [f"The sections are numbered {own}."]
    for index, cell in enumerate(notebook.cells):
        for lesson, numbers in section_references(cell.source):
            there, where = (
                (own, "this notebook") if lesson is None else (lesson_sections(lesson, folder), f"lesson {lesson}")
            )
            problems += [
                f"{name(index, cell)} names section {number} of {where}: none is there."
                for number in numbers
                if number not in there
            ]
    return problems


def check_fps(notebook: NotebookNode) -> list[str]:
    """Clips are written with the frames per second of the video model, also in the programs to copy."""
    problems = []
    for index, cell in enumerate(notebook.cells):
        is_code = cell.cell_type == "code"
        for program in [cell.source] if is_code else PROGRAM.findall(cell.source):
            for node in ast.walk(parse(program) or ast.Module([], [])):
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "export_to_video":
                    fps = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("fps")
                    if fps != str(FPS):
                        problems.append(f"{name(index, cell)} writes a clip with fps={fps}; Wan's clips have {FPS}.")
    return problems


def check_environment(notebook: NotebookNode) -> list[str]:
    """The cell that says what this machine is was run with the pinned versions: nbval does not compare its output."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    return [
        f"{name(index, cell)} does not show {package} {pins[package]}, as requirements.txt has it: run it again."
        for index, cell in code_cells(notebook)
        if "devices.environment()" in cell.source
        for package in ("torch", "diffusers", "transformers", "bitsandbytes")
        if not any(pins[package] in text for text in output_texts(cell))
    ]


def check_details(notebook: NotebookNode) -> list[str]:
    """A folded solution has no blank line in it: Markdown ends an HTML block there, and the page shows what follows."""
    return [
        f"{name(index, cell)} has a <details> block with a blank line in it."
        for index, cell in text_cells(notebook)
        for block in re.findall(r"<details>.*?</details>", cell.source, flags=re.DOTALL)
        if re.search(r"\n\s*\n", block)
    ]


def check_ruff(notebook: NotebookNode) -> list[str]:
    """ruff finds nothing, and would format nothing."""
    text = nbformat.writes(notebook) + "\n"
    problems = []
    for arguments in (["check", "--output-format=concise"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--stdin-filename", "notebooks/a.ipynb", "-"]
        done = subprocess.run(command, input=text, text=True, capture_output=True, cwd=ROOT)
        if done.returncode:
            problems.append(f"ruff {arguments[0]}: {(done.stdout + done.stderr).strip()}")
    return problems


CHECKS = [
    check_format,
    check_metadata,
    check_executed,
    check_widgets,
    check_size,
    check_plain_python,
    check_title,
    check_headings,
    check_colours,
    check_lengths,
    check_balance,
    check_frame,
    check_paths,
    check_noise,
    check_tables,
    check_tags,
    check_links,
    check_sections,
    check_fps,
    check_environment,
    check_details,
    check_ruff,
]


def digest(notebook: NotebookNode) -> str:
    """SHA-256 of the code cells with their outputs: changed code, too, must have been run again."""
    cells = [[cell.source, cell.metadata.get("tags", []), cell.outputs] for _, cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def digests() -> str:
    """A line for each notebook: what `DIGESTS` holds."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    return "".join(f"{digest(nbformat.read(path, as_version=4))}  {path.name}\n" for path in paths)


def code_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """The code cells, each with its index in the notebook."""
    return ((index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")


def text_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """The text cells, each with its index in the notebook."""
    return ((index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "markdown")


def name(index: int, cell: NotebookNode) -> str:
    """How a problem names a cell: its index in the notebook and its first line."""
    line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "empty")
    return f"Cell {index} ({line[:60]})"


def tags(cell: NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a code cell, None if it is not plain Python."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def asserts(cell: NotebookNode) -> bool:
    """Whether a code cell asserts anything."""
    tree = parse(cell.source) if cell.cell_type == "code" else None
    return tree is not None and any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def without_code(markdown: str) -> str:
    """Markdown without its code: there, `# ` is a comment and `](` an index."""
    markdown = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", markdown)


def headings(markdown: str) -> list[str]:
    """The headings of a text, as they are read: without marks and the targets of links."""
    plain = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\]\([^)]*\)|[`*\[]", "", heading) for heading in HEADING.findall(plain)]


def skipped_levels(markdown: str) -> list[str]:
    """Where a text goes down by more than one level of heading: who listens to a page finds the way by its levels."""
    plain = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(#{1,6}) +(.*)", plain, re.MULTILINE)
    levels = [0, *(len(marks) for marks, _ in found)]
    return [
        f"The heading {heading!r} is of level {len(marks)}, after one of level {before}."
        for before, (marks, heading) in zip(levels, found, strict=False)
        if len(marks) > before + 1
    ]


def anchors(notebook: NotebookNode) -> list[str]:
    """The anchors of a notebook's headings as JupyterLab makes them: hyphens for blanks. One for each heading."""
    return [heading.replace(" ", "-") for _, cell in text_cells(notebook) for heading in headings(cell.source)]


def file_anchors(path: Path) -> list[str]:
    """The anchors of a notebook, or of a Markdown file as GitHub makes them: lower case, no punctuation."""
    if path.suffix == ".ipynb":
        return anchors(nbformat.read(path, as_version=4))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(path.read_text())]


def broken_links(markdown: str, folder: Path, own: list[str]) -> list[str]:
    """What is wrong with the links of a text in `folder`, whose own anchors are `own`: a sentence for each."""
    problems = []
    for groups in LINK.findall(without_code(markdown)):
        link = "".join(groups)
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path.split("?")[0]
        if path.startswith("/") or not target.exists():
            problems.append(f"links to {link}, which is not there.")
        elif anchor:
            there = (file_anchors(target) if path else own).count(urllib.parse.unquote(anchor))
            if there != 1:
                problems.append(f"links to {link}: {there} headings have that anchor.")
    return problems


def section_numbers(notebook: NotebookNode) -> list[int]:
    """The numbers of a notebook's sections, in order."""
    found = (re.match(r"(\d+)\.", heading) for _, cell in text_cells(notebook) for heading in headings(cell.source))
    return [int(match[1]) for match in found if match]


def lesson_sections(lesson: int, folder: Path) -> list[int]:
    """The section numbers of another lesson; none if there is no such lesson."""
    return [number for path in folder.glob(f"0{lesson}_*.ipynb") for number in section_numbers(nbformat.read(path, 4))]


def section_references(text: str) -> Iterator[tuple[int | None, list[int]]]:
    """The sections that a text names: of which lesson (None: its own), and their numbers."""
    for match in SECTION.finditer(re.sub(r"\s+", " ", text)):
        if match["paper"] is None:  # inside of a link: the section of what it leads to
            lesson = match["before"] or match["after"]
            yield int(lesson) if lesson else None, [int(number) for number in re.findall(r"\d+", match["numbers"])]


def output_texts(cell: NotebookNode) -> Iterator[str]:
    """All text that a reader sees in the outputs of a cell; encoded pictures are left out."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield "\n".join([output.evalue, *output.traceback])
        else:
            for kind, data in output.data.items():
                if kind.startswith("text/") or kind in {"image/svg+xml", "application/json"}:
                    yield re.sub(r"data:[\w/+;-]+,[\w+/=%]+", "", str(data))


if __name__ == "__main__":
    DIGESTS.write_text(digests(), encoding="utf-8")

"""Web pages of the lessons: notebooks with the outputs that they hold, README, results, programs and model cards.

    python tools/pages.py [--notebooks notebooks] [--build build/site] [--links]

Puts the sources together in a temporary folder, where every page lies beside the others, and calls Sphinx there with
the settings in site/. Nothing is executed.
Exit status: 0, or 1 if a page cannot be built or written, or a link leads nowhere.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

try:
    import nbformat

    from helpers import errors, files
except ImportError as error:
    sys.exit(f"{error.name} is missing: start this with `make site`, which sets up .venv.")

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "site"
OTHER_BUILD = "name another folder, as in make site ARGS='--build /tmp/pages'"
RESULTS = Path("benchmarks/results")
WIDGET = "application/vnd.jupyter.widget-view+json"
CODE = r"^(?P<fence>```|~~~).*?^(?P=fence)|`[^`\n]+`"
TARGETS = r"(?P<inline>\]\(<?)(?P<a>[^)\s>]+)|^(?P<named>\s*\[[^\]]+\]:\s*)(?P<b>\S+)"
LINK = re.compile(rf"{CODE}|{TARGETS}|(?P<raw>\b(?:src|href)=[\"'])(?P<c>[^\"']+)", re.MULTILINE | re.DOTALL)
Notebooks = Mapping[Path, nbformat.NotebookNode]  # by their paths in the repository


def picture_message(notebook: nbformat.NotebookNode, index: int) -> str:
    """The message of the pictures of a cell: the first sentence after it, or before it where a section ends."""
    texts = {
        place: re.sub(r"[*`]|(?<!\w)_|_(?!\w)|\[([^]]*)\]\([^)]*\)", r"\1", cell.source)
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
    }
    after = next((text for place, text in texts.items() if place > index), "#")
    before = next((text for place, text in reversed(texts.items()) if place < index), "")
    paragraphs = [part for part in before.split("\n\n") if not part.startswith(("#", "|", "<", "-"))]
    text = after if not after.startswith(("#", "<", "|")) else paragraphs[-1] if paragraphs else ""
    return re.sub(":$", ".", re.split(r"(?<=[.!?])\s", " ".join(text.split()))[0])


def page_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook for a page: checks, Colab's cell and live widgets left out, pictures and clips with their message."""
    page = nbformat.from_dict(notebook)
    page.metadata = nbformat.from_dict({"language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    for index, cell in enumerate(page.cells):
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        message = picture_message(notebook, index)
        cell.metadata["mystnb"] = {"image": {"alt": message}}
        label = f'aria-label="{html.escape(message)}"'
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = output.data["text/html"].replace("<video ", f"<video {label} ")
    page.cells = [cell for cell in page.cells if "check" not in cell.metadata.get("tags", []) and cell.id != "colab"]
    return page


class Sources:
    """The folder that Sphinx reads, as it fills up. `problems` are the links that lead nowhere, a sentence for each."""

    def __init__(self, root: Path, notebooks: Notebooks, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.problems: list[str] = []
        self.programs = sorted(path.relative_to(root) for path in root.glob("programs/*.py"))
        cards = sorted(path.relative_to(root) for path in root.glob("checkpoints/*/README.md"))
        texts = [path.relative_to(root) for path in sorted(root.glob("README*.md"))]
        # The name of the page of each file of the repository that has one. RESULTS are a folder with a page.
        self.pages = {path: path.name.removesuffix(".md") for path in texts} | {Path("README.md"): "index"}
        self.pages |= {path: path.stem for path in (*notebooks, *self.programs)}
        self.pages |= {path: path.parent.name for path in cards}
        if list(root.glob(f"{RESULTS}/*.json")):
            self.pages[RESULTS] = "results"
        (folder / "extra").mkdir(parents=True)

        for path, notebook in notebooks.items():
            page = page_notebook(notebook)
            for cell in page.cells:
                if cell.cell_type == "markdown":
                    cell.source = self.relink(cell.source, path)
            nbformat.write(page, folder / f"{path.stem}.ipynb")
        for path in (*texts, *cards):
            self.write(path, self.relink((root / path).read_text(encoding="utf-8"), path))
        for path in self.programs:
            shown = self.copy(path)
            code = f"```{{literalinclude}} {shown}\n:language: python\n```\n"
            self.write(path, f"# {path.name}\n\n[The file]({shown}) to download.\n\n{code}")
        if RESULTS in self.pages:
            self.write(RESULTS, self.results())
        contents = {
            "Lessons": list(notebooks),
            "Programs": self.programs,
            "Results and models": [RESULTS, *cards],
            "Other languages": [path for path in texts if path.name != "README.md"],
        }
        index = folder / "index.md"
        start = index.read_text(encoding="utf-8") if index.exists() else "# Lessons\n"
        index.write_text(f"{start}\n{self.contents(contents)}", encoding="utf-8")

    def write(self, path: Path, text: str) -> None:
        """Write the page of a file of the repository."""
        (self.folder / f"{self.pages[path]}.md").write_text(text, encoding="utf-8")

    def contents(self, parts: Mapping[str, list[Path]]) -> str:
        """What the side bar lists."""
        text = ""
        for caption, paths in parts.items():
            names = [self.pages[path] for path in paths if path in self.pages]
            if names:
                text += f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n\n"
        return text

    def relink(self, text: str, source: Path) -> str:
        """A Markdown text of the file `source` with each link changed to where its target lies among the pages."""

        def change(match: re.Match[str]) -> str:
            link = match["a"] or match["b"] or match["c"]
            if link is None or re.match(r"[a-z]+:|#|//", link):
                return match[0]
            return (match["inline"] or match["named"] or match["raw"]) + self.target(link, source, bool(match["raw"]))

        return LINK.sub(change, text)

    def target(self, link: str, source: Path, raw: bool) -> str:
        """Where a link of the file `source` leads among the pages; `raw`: it stands in HTML, which Sphinx ignores."""
        name, hash_mark, anchor = link.partition("#")
        path = Path(os.path.normpath(source.parent / urllib.parse.unquote(name)))
        if path in self.pages:
            # JupyterLab's anchors have blanks alone replaced; a page's are those of GitHub.
            anchor = re.sub(r"[^\w\-]", "", urllib.parse.unquote(anchor).lower())
            # Sphinx finds the page of a file that it reads by the file's name.
            suffix = ".html" if raw else ".ipynb" if path.suffix == ".ipynb" else ".md"
            return self.pages[path] + suffix + hash_mark + anchor
        if not path.is_absolute() and path.parts[0] != ".." and (self.root / path).is_file():
            return self.copy(path, raw)
        self.problems.append(f"{source} links to {link}, which is no page and no file of the repository.")
        return link

    def copy(self, path: Path, raw: bool = False) -> str:
        """Put a file of the repository beside the pages, and return where it lies."""
        place = self.folder / ("extra/files" if raw else "files") / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / path, place)
        return f"files/{path.as_posix()}"

    def results(self) -> str:
        """The page of what was measured: for each file what all its rows share, and a table of the rest."""
        text = (
            "# Results\n\nWhat the lessons and the README quote, as it was recorded: a section for each file, with what"
            " all its rows share in a sentence, and a table of what differs. Memory is in GB of 1e9 bytes; the"
            " start page says what each column means. Wide tables scroll by themselves.\n"
        )
        for path in sorted((self.root / RESULTS).glob("*.json")):
            text += f"\n## {path.stem.replace('_', ', ')}\n\n[{path.name}]({self.copy(RESULTS / path.name)})"
            rows = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(rows, list):
                text += results_table(rows)
            else:
                text += " is a recording of single copies and kernels, which the lessons draw: it has no rows.\n"
        return text


def results_table(rows: list[dict]) -> str:
    """The records of a file in Markdown: a sentence and a table."""
    from helpers import records  # here: it imports torch, which takes seconds, and a run needs no results at its start

    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = [name for name in names if not any(isinstance(row.get(name), (list, dict)) for row in rows)]
    differing = [name for name in plain if len({row.get(name) for row in rows}) > 1]
    shared = {name: rows[0][name] for name in plain if name not in differing and rows[0].get(name) is not None}
    sentence = "; ".join(f"{name} {shown(content)}" for name, content in shared.items())
    if not differing:
        return f": {sentence}.\n"
    frame = records.table([{name: row.get(name) for name in differing} for row in rows], differing)
    lines = [[differing[0], *frame.columns], ["---"] * len(differing), *frame.itertuples()]
    cells = [" | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in line) for line in lines]
    table = "".join(f"| {line} |\n" for line in cells)
    return f": {sentence}.\n\n```{{table}}\n:class: results\n\n{table}```\n"


def shown(content: Any) -> str:
    """A field for a sentence in Markdown."""
    if isinstance(content, bool):
        return "yes" if content else "no"
    return f"<{content}>" if str(content).startswith("http") else str(content)


def sphinx(sources: Path, target: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    """Call Sphinx on a folder of sources. What it warns of is in `stderr`, a line for each."""
    options = [
        "-q",
        "--no-color",
        "-d",
        str(sources.parent / "doctrees"),
        "-D",
        f"html_extra_path={sources / 'extra'}",
    ]
    command = [sys.executable, "-m", "sphinx", "-b", builder, "-c", str(SETTINGS), *options, str(sources), str(target)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def build(root: Path, notebooks: Notebooks, target: Path, elsewhere: str = OTHER_BUILD) -> list[str]:
    """Write the pages into the folder `target`. Returns what is wrong with their links, a sentence for each.

    `root` is the repository that they belong to: what it has of README, results, programs and model cards has a page.
    Raises TutorialError if the pages cannot be built or written; `elsewhere` says how to name another folder.
    """
    files.check_writable(target, elsewhere)
    try:
        with tempfile.TemporaryDirectory(prefix=".pages-", dir=target) as work:
            # Sphinx leaves a folder of pictures beside the one that it is told to write.
            sources, pages = Path(work) / "sources", Path(work) / "out" / "pages"
            problems = Sources(root, notebooks, sources).problems
            done = sphinx(sources, pages)
            if done.returncode:
                said = [line.strip() for line in done.stderr.splitlines() if "rror: " in line or "xception: " in line]
                reason = said[-1].rstrip(".") if said else f"Sphinx {errors.describe_end(done.returncode)}"
                raise errors.TutorialError(f"The pages could not be built: {reason}.")
            problems += [line.replace(f"{sources}/", "") for line in done.stderr.splitlines() if line.strip()]
            for name in (".buildinfo", "objects.inv"):
                (pages / name).unlink(missing_ok=True)
            problems += dead_links(pages)
            shutil.copytree(pages, target, dirs_exist_ok=True)
    except shutil.Error as error:
        raise errors.TutorialError(f"{target} cannot be written ({error.args[0][0][2]}): {elsewhere}.") from None
    except OSError as error:
        raise files.cannot_write(error.filename or target, error, elsewhere) from None
    return problems


class Page(HTMLParser):
    """What a page links to, the places in it that links may lead to, and what it must not have."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = {""}
        self.links: list[str] = []
        self.problems: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """HTMLParser calls this."""
        values = {name: value or "" for name, value in attributes}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "img" and "alt" not in values:
            self.problems.append(f"has a picture with no description: {values.get('src', '')[:60]}")
        for link in (values[name] for name in ("href", "src", "poster", "data") if name in values):
            remote = re.match(r"https?:|//", link)
            if remote and (tag != "a" and values.get("rel") != "canonical"):
                self.problems.append(f"fetches {link} from the network.")
            elif not re.match(r"[a-zA-Z]+:|//", link):
                self.links.append(link)


def dead_links(folder: Path) -> list[str]:
    """What is wrong with the pages in a folder: links inside it that lead nowhere, and what `Page` finds."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        problems += [f"{name} {problem}" for problem in page.problems]
        for link in dict.fromkeys(page.links):
            parts = urllib.parse.urlsplit(link)
            target = Path(os.path.normpath(path.parent / urllib.parse.unquote(parts.path))) if parts.path else path
            if not (target.is_file() and target.is_relative_to(folder)):
                problems.append(f"{name} links to {link}, which is not there.")
            elif target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].places:
                problems.append(f"{name} links to {link}: that page has no such place.")
    return problems


def dead_external_links(root: Path, notebooks: Notebooks) -> Iterator[str]:
    """Ask each address on the web that a page links to, and name those that do not answer."""
    with tempfile.TemporaryDirectory() as work:
        sources, answers = Path(work) / "sources", Path(work) / "answers"
        Sources(root, notebooks, sources)
        sphinx(sources, answers, "linkcheck")
        output = answers / "output.json"
        if not output.exists():
            raise errors.TutorialError(
                "The links could not be looked up: Sphinx stopped before it asked for the first."
            )
        for line in output.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            if answer["status"] in ("broken", "timeout"):
                yield f"{answer['filename']} links to {answer['uri']}: {answer['info'] or answer['status']}"


def read_notebooks(folder: Path) -> dict[Path, nbformat.NotebookNode]:
    """The notebooks of a folder as they are stored, by their paths in the repository, which is the folder's own."""
    return {Path(folder.name) / path.name: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}


def main(arguments: list[str] | None = None) -> int:
    """Build the pages from the stored notebooks, or look up the links to elsewhere. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="folder of the notebooks")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "site", help="folder for the pages")
    parser.add_argument(
        "--links", action="store_true", help="write no page; look up every link to elsewhere on the web"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    folder = options.notebooks.resolve()
    try:
        notebooks = read_notebooks(folder)
        if options.links:
            problems = list(dead_external_links(folder.parent, notebooks))
        else:
            problems = build(folder.parent, notebooks, options.build.resolve())
    except errors.TutorialError as error:
        print(error, file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.links:
        print(f"{len(problems)} without an answer." if problems else "All links to elsewhere answer.")
    else:
        print(f"{time.monotonic() - started:.0f} s. Open {options.build.resolve()}/index.html in a browser.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

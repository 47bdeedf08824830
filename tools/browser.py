"""The lessons in JupyterLab and their web pages, in a real browser: what a reader sees, and no other test does.

    python tools/browser.py [--only WORD ...]

Chromium or Chrome, whichever is on PATH, runs with no window. The lessons run in `make lab` on a copy of the notebooks;
the pages are those of `make site`. A picture of each lies in build/browser/ afterwards.
Exit status: 0 if all passed, 1 if any failed, 2 if they could not start: no browser, say; 130 after Ctrl-C.
"""

import argparse
import contextlib
import functools
import http.server
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import nbformat
    import pages
    import run_notebooks

    from helpers import errors, files
except ImportError as error:
    sys.exit(f"{error.name} is missing: start this with `make test-browser`, which sets up .venv.")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build" / "browser"
SITE = ROOT / "build" / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LESSON_LIMIT_S = 1200  # a lesson takes two minutes on two quiet cores
LOG_EVERY_S = 20
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
CONTRAST, LARGE_CONTRAST = 4.5, 3.0  # WCAG 2, level AA
H264 = 'video/mp4; codecs="avc1.42E01E"'

# Whether the lesson in the front tab is the one named, with its kernel ready.
LESSON_IS_OPEN = """name => {
    const panel = globalThis.jupyterapp?.shell.currentWidget;
    return panel?.context?.path === name && panel.context.isReady
        && panel.sessionContext.session?.kernel?.status === 'idle';
}"""
# How far it is.
LESSON_STATE = """() => {
    const panel = jupyterapp.shell.currentWidget;
    const cells = panel.content.model.sharedModel.cells.map(cell => cell.toJSON()).filter(
        cell => cell.cell_type === 'code' && [cell.source].flat().join('').trim());
    const failed = cells.findIndex(cell => !(cell.metadata.tags ?? []).includes('raises-exception')
        && cell.outputs.some(output => output.output_type === 'error'));
    const error = failed < 0 ? null : cells[failed].outputs.find(output => output.output_type === 'error');
    return {
        kernel: panel.sessionContext.session?.kernel?.status ?? 'none',
        dialog: document.querySelector('.jp-Dialog-content')?.innerText,
        cells: cells.length,
        executed: cells.filter(cell => cell.execution_count).length,
        error: error && `cell ${failed + 1} (${[cells[failed].source].flat().join('').split('\\n')[0]}): `
            + `${error.ename}: ${error.evalue.split('\\n')[0]}`,
    };
}"""
# How many pictures and clips stand in the outputs, drawn: a broken one has no width.
PICTURES = """async () => {
    const shown = [...document.querySelectorAll('.jp-OutputArea-output img, .jp-OutputArea-output video')];
    const drawn = element => element.naturalWidth || element.videoWidth;
    for (let wait = 0; wait < 50 && !shown.every(drawn); wait++) await new Promise(done => setTimeout(done, 100));
    return shown.filter(drawn).length;
}"""
# Scroll to the first picture until it stays on the screen: JupyterLab lays out a cell only once it comes near.
SHOW_PICTURE = """async () => {
    const picture = document.querySelector('.jp-OutputArea-output img');
    for (let wait = 0, steady = 0; wait < 50 && steady < 5; wait++) {
        const {top, bottom, height} = picture.getBoundingClientRect();
        steady = height && top < innerHeight && bottom > 0 ? steady + 1 : 0;
        if (!steady) picture.scrollIntoView({block: 'center'});
        await new Promise(done => setTimeout(done, 200));
    }
}"""
PAGE_PARTS = """() => ({
    links: [...document.querySelectorAll('a[href]'), ...document.forms].map(link => link.href ?? link.action),
    places: [...document.querySelectorAll('[id], a[name]')].flatMap(element => [element.id, element.name ?? '']),
})"""
PLAY = """async () => {
    const clip = document.querySelector('video');
    clip.scrollIntoView({block: 'center', behavior: 'instant'});
    clip.muted = true;
    let problem = null;
    clip.play().catch(error => { problem = error.message; });
    for (let wait = 0; wait < 50 && !problem && clip.currentTime < 0.3; wait++)
        await new Promise(done => setTimeout(done, 100));
    return {problem, seconds: clip.currentTime, width: clip.videoWidth,
        frames: clip.getVideoPlaybackQuality().totalVideoFrames};
}"""
# What sticks out of the window must stand in something that scrolls, and that fits. `stuck` does not.
WIDE = """width => {
    const article = document.querySelector('article');
    const right = element => element.getBoundingClientRect().right;
    const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
    const stuck = new Set(), scrolling = new Set();
    for (const element of article.querySelectorAll('*')) {
        if (!element.checkVisibility() || right(element) <= width + 1) continue;
        let outer = element.parentElement;
        while (outer !== article && !(scrolls(outer) && right(outer) <= width + 1)) outer = outer.parentElement;
        if (outer !== article) scrolling.add(outer);
        else if (![...stuck].some(other => other.contains(element))) stuck.add(element);
    }
    for (const element of scrolling) {
        element.scrollLeft = 1e6;
        if (!element.scrollLeft) stuck.add(element);
    }
    const name = element => `<${element.tagName.toLowerCase()}> "${element.textContent.trim().slice(0, 40)}"`;
    return {page: document.scrollingElement.scrollWidth, stuck: [...stuck].map(name), scrolling: scrolling.size};
}"""
# Each pair of colours that a text has, once, with the first text that has it. A canvas mixes what is transparent.
COLOURS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const paint = (colour, opacity = 1) => {
        canvas.globalAlpha = opacity; canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const found = new Map();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
        if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (element.closest('script, style, noscript, .visually-hidden')) continue;
        const around = [];
        for (let outer = element; outer; outer = outer.parentElement) around.unshift(getComputedStyle(outer));
        const own = around.at(-1), size = parseFloat(own.fontSize);
        paint('white');
        let back; for (const style of around) back = paint(style.backgroundColor);
        const front = paint(own.color, around.reduce((product, style) => product * style.opacity, 1));
        const large = size >= 24 || (size >= 18.66 && own.fontWeight >= 700);
        const key = JSON.stringify([front, back, large]);
        if (!found.has(key)) found.set(key, {front, back, large, text: text.slice(0, 40)});
    }
    paint('white'); paint(getComputedStyle(document.documentElement).backgroundColor);
    return {body: paint(getComputedStyle(document.body).backgroundColor), texts: [...found.values()]};
}"""


class Failed(Exception):
    """A check that did not pass: one sentence."""


def find_browser() -> str | None:
    """The path of the browser, None if PATH has none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def brightness(colour: list[int]) -> float:
    """The relative luminance of a colour of sRGB, as WCAG 2 defines it: 0 to 1."""
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[int], second: list[int]) -> float:
    """The contrast of two colours, as WCAG 2 defines it: 1 to 21."""
    dark, light = sorted([brightness(first), brightness(second)])
    return (light + 0.05) / (dark + 0.05)


def count_pictures(notebook: nbformat.NotebookNode) -> int:
    """How many pictures and clips a notebook stores."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum(
        any(kind.startswith("image/") for kind in kinds) or "<video" in kinds.get("text/html", "") for kinds in data
    )


def fail_if(problems: list[str]) -> None:
    """Raise Failed with the first few of the problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Failed(" ".join("; ".join(problems[:5]).split()) + more)  # on one line


@contextlib.contextmanager
def run_lab() -> Iterator[str]:
    """JupyterLab as `make lab` starts it, with nobody's settings. Gives the address to put a path into.

    It works on a folder with this repository's notebooks less their outputs, and a link to everything else.
    """
    with tempfile.TemporaryDirectory(prefix="browser-") as name:
        folder = Path(name) / "repository"
        (folder / "notebooks").mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name != "notebooks":
                (folder / path.name).symlink_to(path)
        for path in NOTEBOOKS.glob("*.ipynb"):
            notebook = run_notebooks.read_notebook(path)
            notebook.metadata.language_info.version = "3.0.0"  # another Python's: no reason to be unsaved once opened
            nbformat.write(notebook, folder / "notebooks" / path.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        token = secrets.token_hex(16)
        private = {
            variable: str(Path(name) / variable.lower())
            for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "TORCHINDUCTOR_CACHE_DIR")
        }
        environment = {key: value for key, value in os.environ.items() if key != "TUTORIAL_MODELS"}
        environment |= private | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        arguments = (
            f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"
            " --LabApp.expose_app_in_browser=True"
        )
        log = Path(name) / "log"
        with log.open("w") as output:
            # -o: what is set up for this folder would be set up for the copy.
            lab = subprocess.Popen(
                ["make", "-o", "setup", "lab", f"ARGS={arguments}"],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for(f"http://127.0.0.1:{port}/api", lab, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(lab.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                lab.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(lab.pid, signal.SIGKILL)
            lab.wait()


def wait_for(address: str, lab: subprocess.Popen, log: Path) -> None:
    """Wait until JupyterLab answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and lab.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    said = [line for line in log.read_text().splitlines() if line.strip() and not line.startswith("make")]
    raise Failed(f"JupyterLab did not start: {said[-1] if said else 'it says nothing'}")


@contextlib.contextmanager
def open_lesson(browser: Any, address: str, stem: str) -> Iterator[Any]:
    """A lesson in JupyterLab, all its cells executed."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    try:
        page.goto(address.format(f"notebooks/{stem}.ipynb"))
        deadline = time.monotonic() + 120
        while not page.evaluate(LESSON_IS_OPEN, f"notebooks/{stem}.ipynb"):
            if time.monotonic() > deadline:
                page.screenshot(path=BUILD / f"lesson-{stem}.png")
                raise Failed("JupyterLab does not open the notebook within 120 s.")
            time.sleep(0.5)
        if page.evaluate("jupyterapp.shell.currentWidget.context.model.dirty"):
            raise Failed("the notebook is unsaved as soon as it is open.")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        wait_for_cells(page, stem)
        yield page
    finally:
        with contextlib.suppress(Exception):  # the page is lost, and its kernel ends with the server
            page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        page.close()


def wait_for_cells(page: Any, stem: str) -> None:
    """Wait until all cells are executed. Raises Failed at the first error that is not meant."""
    started = logged = time.monotonic()
    while True:
        state = page.evaluate(LESSON_STATE)
        progress = f"{state['executed']}/{state['cells']}"
        problem = state["error"] or state["dialog"]
        if state["kernel"] in ("none", "dead", "restarting", "autorestarting", "terminating"):
            problem = f"after {progress} cells the kernel is {state['kernel']}"
        if problem:
            page.screenshot(path=BUILD / f"lesson-{stem}.png")
            fail_if([problem])
        if state["executed"] == state["cells"] and state["kernel"] == "idle":
            return
        now = time.monotonic()
        if now - started > LESSON_LIMIT_S:
            raise Failed(f"{progress} cells in {LESSON_LIMIT_S} s.")
        if now - logged > LOG_EVERY_S:
            logged = now
            print(f"[{stem}] cell {progress}  {now - started:.0f} s", flush=True)
        time.sleep(0.5)


def check_lesson(browser: Any, address: str, stem: str) -> str:
    """All cells of a lesson run in JupyterLab with no error, and as many pictures show as the notebook stores."""
    wanted = count_pictures(nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4))
    with open_lesson(browser, address, stem) as page:
        shown = page.evaluate(PICTURES)
        if shown:
            page.evaluate(SHOW_PICTURE)
        page.screenshot(path=BUILD / f"lesson-{stem}.png")
        if page.locator(".jp-toastContainer .Toastify__toast").count():
            raise Failed("JupyterLab shows a message: " + page.locator(".Toastify__toast").first.inner_text())
        if shown < wanted:
            raise Failed(f"{shown} pictures are shown; the stored notebook has {wanted}.")
        return f"{shown} pictures"


def check_form(browser: Any, address: str) -> str:
    """The form of the start page answers anew, and as its function does, whenever something is chosen."""
    from helpers import finder  # here: it takes seconds to import

    model, card, ram = finder.REPOSITORIES["flux"], 12, 32
    with open_lesson(browser, address, "00_start_here") as page:
        form = page.locator(".widget-vbox")
        if not form.count():
            raise Failed("the start page shows no form.")
        form.scroll_into_view_if_needed()

        def answer() -> None:
            wanted = finder.answer_for(model, card, ram).split()
            deadline = time.monotonic() + 30
            while (said := form.locator("pre").inner_text()).split() != wanted:
                if time.monotonic() > deadline:
                    raise Failed(f"for {model}, {card} GB and {ram} GB of RAM the form says: {said[:200]}")
                time.sleep(0.2)

        answer()
        form.get_by_label("card, GB").select_option(label=str(card := 8))
        answer()
        form.get_by_label("host, GB").select_option(label=str(ram := 16))
        answer()
        model = finder.REPOSITORIES["wan"]
        form.get_by_label("model").fill(model)
        form.get_by_label("model").press("Enter")
        answer()
        page.screenshot(path=BUILD / "form.png")
    return "four plans"


@contextlib.contextmanager
def serve_site() -> Iterator[str]:
    """The web pages on a server of their own. Gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            """Nothing: each request would be a line."""

    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def page_names() -> list[str]:
    """The files of the pages."""
    return sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))


def check_links(browser: Any, address: str) -> str:
    """Each link inside the site leads to a page, a place in it or a file, and from the first page to every other."""
    page = browser.new_page()
    problems = []
    page.on("response", lambda answer: answer.status < 400 or problems.append(f"{answer.url} answers {answer.status}"))
    page.on("pageerror", lambda error: problems.append(f"{page.url} has an error in a script: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"{page.url} does not get {request.url}"))
    places: dict[str, set[str]] = {}
    links: dict[str, str] = {}  # and the page that has it first
    waiting, known = [f"{address}index.html"], {f"{address}index.html"}
    while waiting:
        here = waiting.pop()
        page.goto(here)
        parts = page.evaluate(PAGE_PARTS)
        places[here] = set(parts["places"])
        for link in parts["links"]:
            target = urllib.parse.urldefrag(link).url
            if not link.startswith(address):
                continue
            links.setdefault(link, here)
            if target not in known:
                known.add(target)
                if target.endswith(".html"):
                    waiting.append(target)
                elif (status := page.request.get(target).status) != 200:
                    problems.append(f"{here} links to {target}, which answers {status}")
    page.goto(f"{address}index.html")
    page.screenshot(path=BUILD / "site.png")
    page.close()
    for link, source in links.items():
        target, place = urllib.parse.urldefrag(link)
        if place and target in places and urllib.parse.unquote(place) not in places[target]:
            problems.append(f"{source} links to {link}: that page has no such place")
    problems += [f"no link leads to {name}" for name in page_names() if f"{address}{name}" not in known]
    fail_if([problem.replace(address, "") for problem in dict.fromkeys(problems)])
    return f"{len(places)} pages, {len(links)} links"


def check_clip(browser: Any, address: str) -> str:
    """The clip on the page of lesson 3 plays."""
    page = browser.new_page()
    page.goto(f"{address}03_group_offload_video.html")
    if not page.locator("video").count():
        raise Failed("the page of lesson 3 has no clip.")
    can_play = page.evaluate("kind => document.createElement('video').canPlayType(kind)", H264)
    if not can_play:
        raise Failed("this browser was built without H.264, which the clip is in: install Debian's chromium or Chrome.")
    played = page.evaluate(PLAY)
    page.wait_for_timeout(500)  # until it is drawn where it was scrolled to
    page.screenshot(path=BUILD / "clip.png")
    page.close()
    if played["problem"] or played["seconds"] < 0.3 or not played["width"] or not played["frames"]:
        raise Failed(f"the clip of lesson 3 does not play: {played}")
    return f"{played['frames']} frames in {played['seconds']:.1f} s"


def check_phone(browser: Any, address: str) -> str:
    """On a phone no page scrolls sideways, and what is wider than the screen scrolls by itself."""
    width = PHONE["viewport"]["width"]
    page = browser.new_context(**PHONE).new_page()
    problems, scrolling = [], 0
    for name in page_names():
        page.goto(f"{address}{name}")
        seen = page.evaluate(WIDE, width)
        scrolling += seen["scrolling"]
        page.screenshot(path=BUILD / f"phone-{Path(name).stem}.png")
        if seen["page"] > width:
            problems.append(f"{name} is {seen['page']} pixels wide")
        problems += [f"{name} has {what}, which sticks out" for what in seen["stuck"]]
    page.context.close()
    fail_if(problems)
    return f"{len(page_names())} pages, {scrolling} parts scroll by themselves"


def check_dark(browser: Any, address: str) -> str:
    """In dark mode the pages are dark, and each text is readable."""
    page = browser.new_context(color_scheme="dark").new_page()
    problems, lowest = [], 21.0
    for name in page_names():
        page.goto(f"{address}{name}")
        seen = page.evaluate(COLOURS)
        page.screenshot(path=BUILD / f"dark-{Path(name).stem}.png")
        if brightness(seen["body"]) > 0.05:
            problems.append(f"{name} is not dark: its background is {seen['body']}")
        for text in seen["texts"]:
            ratio = contrast(text["front"], text["back"])
            lowest = min(lowest, ratio)
            if ratio < (LARGE_CONTRAST if text["large"] else CONTRAST):
                problems.append(f'{name} has "{text["text"]}" in {text["front"]} on {text["back"]}: {ratio:.1f}')
    page.context.close()
    fail_if(problems)
    return f"{len(page_names())} pages, contrast {lowest:.1f} or more"


def build_site(*_: Any) -> str:
    """The pages as `make site` writes them, into an empty folder."""
    shutil.rmtree(SITE, ignore_errors=True)
    if pages.main([]):
        raise Failed("make site says what is wrong, above.")
    return f"{len(page_names())} pages"


LAB_CHECKS: dict[str, Callable[[Any, str], str]] = {
    f"lesson-{path.stem}": functools.partial(check_lesson, stem=path.stem) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
} | {"form": check_form}
SITE_CHECKS: dict[str, Callable[[Any, str], str]] = {
    "site": build_site,
    "links": check_links,
    "clip": check_clip,
    "phone": check_phone,
    "dark": check_dark,
}


def run_checks(
    checks: dict[str, Callable[[Any, str], str]], browser: Any, address: str, failures: tuple[type[Exception], ...]
) -> list[str]:
    """Run checks, a line for each. Returns the names of those that failed, which is to raise one of `failures`."""
    failed = []
    for name, check in checks.items():
        started = time.monotonic()
        try:
            word, said = "passed", check(browser, address)
        except failures as error:
            word, said = "FAILED", run_notebooks.first_line(str(error))
            failed.append(name)
        print(f"{name}  {word}  {time.monotonic() - started:.1f} s  {said}", flush=True)
    return failed


def run_all(path: str, wanted: Callable[[str], bool]) -> list[str]:
    """Run the wanted checks in the browser at `path`. Returns the names of those that failed."""
    from playwright.sync_api import Error, sync_playwright

    failed = []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path)
        except Error as error:
            raise errors.TutorialError(f"{path} does not start: {run_notebooks.first_line(str(error))}") from None
        for checks, serve in ((LAB_CHECKS, run_lab), (SITE_CHECKS, serve_site)):
            chosen = {name: check for name, check in checks.items() if wanted(name)}
            if chosen:
                with serve() as address:
                    failed += run_checks(chosen, browser, address, (Failed, Error))
        browser.close()
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run the checks. Returns the exit status."""
    names = [*LAB_CHECKS, *SITE_CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help=f"checks with one of these in their names: {names}")
    only = parser.parse_args(arguments).only
    chosen = [name for name in names if not only or any(word in name for word in only)]
    path = find_browser()
    problem = None
    if not chosen:
        problem = f"No check has {' or '.join(only)} in its name: there are {', '.join(names)}."
    elif path is None:
        problem = f"No browser is on PATH ({', '.join(BROWSERS)}): on Debian, sudo apt install chromium."
    elif importlib.util.find_spec("playwright") is None:
        problem = "playwright is missing: start this with `make test-browser`, which installs it."
    if problem:
        print(problem, file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        files.check_writable(BUILD, "make this repository's folder writable")
        failed = run_all(path, chosen.__contains__)
    except (Failed, errors.TutorialError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    verdict = f"{len(failed)} of {len(chosen)} failed: {', '.join(failed)}" if failed else f"{len(chosen)} passed"
    print(f"{verdict}. {time.monotonic() - started:.0f} s. Pictures are in {BUILD}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

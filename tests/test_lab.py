"""`make lab`: no pop-up, and a notebook that is not unsaved as soon as it opens."""

import asyncio
import json
import re
from pathlib import Path

import nbformat
from jupyter_client.manager import start_new_kernel
from jupyterlab import NeverCheckForUpdate
from jupyterlab.labapp import LabApp
from lab_contents import LessonContents

ROOT = Path(__file__).resolve().parent.parent
LAB = re.search(r"(?s)-m jupyterlab (.*?)\n\n", (ROOT / "Makefile").read_text())[1]


def test_nobody_is_asked_for_news():
    app = LabApp()
    app.parse_command_line(re.findall(r"--LabApp\.\S+", LAB.replace('"', "").replace("$(CURDIR)", str(ROOT))))
    assert app.news_url is None and app.check_for_updates_class is NeverCheckForUpdate
    # Without a setting the front end asks whether to, whatever the address of the news.
    settings = json.loads((Path(app.app_settings_dir) / "overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false"}


def test_a_notebook_has_the_metadata_of_the_kernel_that_opens_it():
    """JupyterLab compares both with what it would write, and calls the notebook changed where they differ."""
    assert f"--ServerApp.contents_manager_class=tools.lab_contents.{LessonContents.__name__}" in LAB
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        language_info = client.kernel_info(reply=True, timeout=60)["content"]["language_info"]
        spec = manager.kernel_spec
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    contents = LessonContents(root_dir=str(ROOT / "notebooks"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        opened = asyncio.run(contents.get(path.name))["content"]
        assert opened.metadata["language_info"] == language_info
        expected = {"name": "python3", "display_name": spec.display_name, "language": spec.language}
        assert opened.metadata["kernelspec"] == expected
        # An older format, or a cell without id, would be mended at once too.
        stored = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        assert (stored.nbformat, stored.nbformat_minor) == (4, 5) and all(cell.id for cell in stored.cells)
    assert asyncio.run(contents.get("", type="directory"))["type"] == "directory"

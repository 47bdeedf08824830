"""The lessons as their tests read them: the sources of cells, the symptoms of a table, a folded solution."""

import html
import json
import re
from typing import Any

from helpers.checkpoints import PACKAGE_ROOT


def read(name: str) -> list[dict[str, Any]]:
    """The cells of a lesson, by the name of its notebook; `source` is one text."""
    cells = json.loads((PACKAGE_ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def sources(name: str) -> dict[str, str]:
    """The sources of all cells, by the id of the cell."""
    return {cell["id"]: cell["source"] for cell in read(name)}


def symptom(table: str, message: str) -> str:
    """The message, which must be a symptom in this table, in code."""
    symptoms = [line.split(" | ")[0] for line in table.splitlines()]
    assert any(f"`{message}`" in text for text in symptoms), f"the lesson's table has no {message!r}"
    return message


def solution(text: str) -> str:
    """What is folded in a cell, its HTML entities resolved."""
    return html.unescape(re.search(r"</summary>(.*?)</details>", text, re.DOTALL)[1])

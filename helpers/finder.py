"""The card finder of the start page: a table for those who read, and a form for those who run it."""

import os
from html import escape
from typing import Any

from helpers import plan
from helpers.cards import usual_card
from helpers.errors import TutorialError
from helpers.predict import REPOSITORIES

CARDS_GB = (6, 8, 12, 16, 24)
RAM_GB = 64
# Set by what starts a kernel for somebody who looks at it. A notebook that is merely executed has none of them, and a
# stored form would show nothing.
LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")


def rows(model: str) -> list[dict[str, str]]:
    """What to type for each size of card, and what it takes: a line for each."""
    found = []
    for gb in CARDS_GB:
        gpu = usual_card(gb)
        made = plan.find_plan(plan.Request(model, gb, RAM_GB, gpu))
        figures = {name: figure.text for name, figure in made.figures.items() if not name.startswith("to save")}
        drawn = next(name for name in figures if name.startswith(("a picture", "a clip")))
        found.append(
            {
                "card": f"{gb} GB, {gpu}",
                "draw.py": made.lines[-1].partition('" ')[2] if made.lines else made.problem,
                "of the card": figures["memory of the card"].removesuffix(" reserved"),
                "host memory": figures["host memory"],
                "a step": figures["a step"],
                "picture" if drawn == "a picture" else "clip": figures[drawn],
            }
        )
    return found


def is_live() -> bool:
    """Whether somebody looks at this kernel through a front end that can show a form."""
    return any(name in os.environ for name in LIVE)


def form() -> Any:
    """The form, which says its plan anew whenever something is chosen; None where nobody could use it."""
    if not is_live():
        return None
    import ipywidgets

    model = ipywidgets.Combobox(
        value=REPOSITORIES["flux"], options=[*REPOSITORIES.values()], description="model", continuous_update=False
    )
    card = ipywidgets.Dropdown(value=12, options=CARDS_GB, description="card, GB")
    ram = ipywidgets.Dropdown(value=32, options=(16, 24, 32, 48, 64), description="host, GB")
    answer = ipywidgets.HTML()

    def say(change: Any = None) -> None:
        answer.value = f"<pre>{escape(answer_for(model.value, card.value, ram.value))}</pre>"

    for choice in (model, card, ram):
        choice.observe(say, names="value")
    say()
    return ipywidgets.VBox([model, card, ram, answer])


def answer_for(model: str, card_gb: float, ram_gb: float) -> str:
    """The plan as text, or the sentence that says why there is none."""
    try:
        return plan.describe(plan.find_plan(plan.Request(model, card_gb, ram_gb, usual_card(card_gb))))
    except TutorialError as error:
        return str(error)

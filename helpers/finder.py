"""The card finder of the start page: a table for those who read, and a form for those who run it."""

import os
import re
from html import escape
from typing import Any

from helpers import plan
from helpers.cards import usual_card
from helpers.errors import TutorialError
from helpers.predict import REPOSITORIES, load_recorded
from helpers.shapes import known_shapes

CARDS_GB = (6, 8, 12, 16, 24)
LESSONS = ("flux", "wan")  # the models of the lessons: all cards are in the table
FEW_GB = (8, 12)  # the cards of the others, so that the table stays short
RAM_GB = 64
# Set by what starts a kernel for somebody who looks at it. A notebook that is merely executed has none of them, and a
# stored form would show nothing.
LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")


def rows() -> list[dict[str, str]]:
    """What to type for the models with recorded rows and each size of card, and what it takes: a line for each."""
    found = []
    for model, gb in choices():
        gpu = usual_card(gb)
        made = plan.find_plan(plan.Request(model, gb, RAM_GB, gpu))
        if not made.lines:
            continue
        drawn = next(name for name in made.figures if name.startswith(("a picture", "a clip")))
        found.append(
            {
                "model and card": f"{_short(model)}, {gpu}{'' if 'GB' in gpu else f' {gb}GB'}",
                "draw.py": made.lines[-1].partition('" ')[2],
                "of the card": made.figures["memory of the card"].text.removesuffix(" reserved"),
                "host memory": made.figures["host memory"].text,
                "a step": made.figures["a step"].text,
                "picture or clip": made.figures[drawn].text,
            }
        )
    return found


def choices() -> list[tuple[str, int]]:
    """The models with recorded rows and the cards that the table shows."""
    shapes = known_shapes()
    known = {model: path for model, path in REPOSITORIES.items() if load_recorded(path, shapes).rows}
    return [(path, gb) for model, path in known.items() for gb in (CARDS_GB if model in LESSONS else FEW_GB)]


def _short(model: str) -> str:
    """Its name without its owner and what says nothing here."""
    return re.sub("-(dev|T2V).*", "", model.split("/")[1])


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
        gpu = usual_card(card_gb)
        made = plan.describe(plan.find_plan(plan.Request(model, card_gb, ram_gb, gpu)))
        return f"Times are those of the {gpu}: in a terminal, --gpu names another.\n\n{made}"
    except TutorialError as error:
        return str(error)

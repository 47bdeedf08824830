"""The card finder of the start page: a table for those who read, and a form for those who run it."""

import itertools
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


def rows() -> list[dict[str, str]]:
    """What to type for the models with recorded rows and each size of card, and what it takes: a line for each."""
    found = []
    for model, gb in itertools.product(REPOSITORIES.values(), CARDS_GB):
        gpu = usual_card(gb)
        made = plan.find_plan(plan.Request(model, gb, RAM_GB, gpu))
        drawn = next(name for name in made.figures if name.startswith(("a picture", "a clip")))
        found.append(
            {
                "model and card": f"{model.split('/')[1].split('-')[0]}, {gpu}{'' if 'GB' in gpu else f' {gb}GB'}",
                "draw.py": made.lines[-1].partition('" ')[2],
                "of the card": made.figures["memory of the card"].text.removesuffix(" reserved"),
                "host memory": made.figures["host memory"].text,
                "a step": made.figures["a step"].text,
                "all steps": made.figures[drawn].text,
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

"""The one error that helpers raise on purpose."""


class TutorialError(RuntimeError):
    """A mistake that the reader can put right: one sentence that says what is wrong and what to do.

    A notebook shows the sentence alone; a script shows it as the last line of an ordinary traceback.
    """

    def _render_traceback_(self) -> list[str]:
        # IPython calls this method, where an exception has it, in place of printing the traceback.
        return [f"{type(self).__name__}: {self}"]

"""The one error that helpers raise on purpose, and how a process ended, in words."""

import signal


class TutorialError(RuntimeError):
    """A mistake that the reader can put right: one sentence that says what is wrong and what to do.

    A notebook shows the sentence alone; a script shows it as the last line of an ordinary traceback.
    """

    def _render_traceback_(self) -> list[str]:
        # IPython calls this method, where an exception has it, in place of printing the traceback.
        return [f"{type(self).__name__}: {self}"]


def describe_end(returncode: int | None) -> str:
    """How a process ended that should not have: the rest of a sentence that begins with its name.

    `returncode` is that of `subprocess.Popen`: negative for a signal, None where nobody knows.
    """
    if returncode is None:
        return "died"
    if returncode >= 0:
        return f"ended by itself (exit status {returncode})"
    name = signal.Signals(-returncode).name
    if name == "SIGKILL":
        return "was killed (SIGKILL), most often because host memory ran out"
    return f"was stopped by {name}"

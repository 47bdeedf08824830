"""Files that are written: whether they can be, in one go, and one sentence that says why where they cannot."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from helpers.errors import TutorialError

REASONS = {
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the system limits the size of files",
    errno.EACCES: "you have no permission",
    errno.EPERM: "you have no permission",
    errno.ENOENT: "its folder is missing",
    errno.ENOTDIR: "a file stands where a folder must be",
    errno.EEXIST: "a file stands where a folder must be",
    errno.EISDIR: "a folder stands where the file must be",
}


def reason(error: OSError) -> str:
    """Why the system refused, in a few words."""
    says_more = error.errno is None or error.strerror not in (None, os.strerror(error.errno))
    return (error.strerror if says_more else REASONS.get(error.errno, error.strerror)) or str(error)


def cannot_write(path: str | Path, error: OSError, elsewhere: str) -> TutorialError:
    """The error to raise; `elsewhere` says how to choose another place, such as "set TMPDIR to another folder"."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return TutorialError(
        f"{path} cannot be written ({reason(error)}): {'free some space or ' if is_full else ''}{elsewhere}."
    )


def check_writable(folder: Path, elsewhere: str) -> None:
    """Make the folder if it is missing, and check that a file can be written there. Call it before long work.

    Raises TutorialError if it cannot: the sentence says why, and `elsewhere` as in `cannot_write`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise cannot_write(folder, error, elsewhere) from None


def check_space(folder: Path, needed: float, what: str, elsewhere: str) -> None:
    """Raise TutorialError unless the disk of `folder`, which may be missing yet, has `needed` bytes free for `what`."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise TutorialError(
            f"{what} needs {size(needed)} of disk and {existing} has {size(free)} free: free some space or {elsewhere}."
        )


def write_text(path: str | Path, text: str, elsewhere: str = "choose another folder") -> None:
    """Write a text file in one go: a stop half-way, or a full disk, leaves the old file as it was.

    Raises TutorialError if it cannot be written.
    """
    part = Path(path).with_suffix(".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error, elsewhere) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses even where there is nothing to remove
            part.unlink()


def size(number: float) -> str:
    """A number of bytes for a sentence, in the largest unit that does not round it to 0.0."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit / 20:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} bytes"

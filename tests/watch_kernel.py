"""A pytest plugin for nbval: a kernel that ends fails its cell at once, in a sentence, and skips the cells after it.

nbval 0.11 waits for a message of the kernel until the time limit of the cell, and then reports a timeout. If nbval
changes what is used here, the import or the first cell fails.
"""

import time
from queue import Empty

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, NbCellError

from helpers.errors import describe_end

LOOK_EVERY_S = 1
get_message = RunningKernel.get_message


class KernelEnded(Exception):
    """Says how."""


def get_message_of_the_living(self: RunningKernel, stream: str, timeout: float | None = None) -> dict:
    """`get_message`, which looks now and then whether there is still a kernel to wait for."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = LOOK_EVERY_S if end is None else min(LOOK_EVERY_S, max(0, end - time.monotonic()))
        was_alive = self.is_alive()
        try:
            return get_message(self, stream, timeout=left)
        except Empty:
            if not was_alive:  # so that a message it sent last is read first
                raise KernelEnded(f"the kernel {describe_end(self.km.provisioner.process.poll())}") from None
            if end is not None and time.monotonic() >= end:
                raise


RunningKernel.get_message = get_message_of_the_living


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> object:
    """Skips what comes after the end of the kernel."""
    if getattr(item.parent, "kernel_ended", False):
        pytest.skip("the kernel ended in an earlier cell")
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """Names the cell in which the kernel ended."""
    try:
        return (yield)
    except KernelEnded as error:
        assert isinstance(item, IPyNbCell)
        item.parent.kernel_ended = True
        raise NbCellError(item.cell_num, str(error), item.cell.source) from None

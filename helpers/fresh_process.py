"""The other side of `helpers.processes.run_in_fresh_process`: a script that calls one function and pickles its result.

It imports nothing of ours, so that the process holds what the function loads and nothing else.
"""

import os
import pickle
import sys
import threading
import time
from pathlib import Path


def stop_with(parent: int) -> None:
    """End this process soon after its parent has ended, however that happened: it holds gigabytes that nobody needs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    job_file, result_file, parent = sys.argv[1:]
    # Told, not asked: the parent may have ended by now. On Windows the launcher of a virtual environment is in between.
    parent_id = int(parent) if os.name == "posix" else os.getppid()
    threading.Thread(target=stop_with, args=[parent_id], daemon=True).start()
    with open(job_file, "rb") as job:
        sys.path[:] = pickle.load(job)
        function, arguments = pickle.load(job)
    Path(result_file).write_bytes(pickle.dumps(function(**arguments)))

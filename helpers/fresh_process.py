"""The other side of `helpers.measure.run_in_fresh_process`: a script that calls one function and writes its result.

It imports nothing of ours, so that the process holds what the function loads and nothing else.
"""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def find(place: dict) -> Callable:
    """The function at `place`: {"source", "function"}, or {"module", "function"}. See `helpers.measure._locate`."""
    if "source" in place:
        namespace = {"__name__": "__main__"}
        exec(compile(place["source"], f"<{place['function']}>", "exec"), namespace)
        return namespace[place["function"]]
    function = importlib.import_module(place["module"])
    for name in place["function"].split("."):
        function = getattr(function, name)
    return function


def stop_with(parent: int) -> None:
    """End this process soon after its parent has ended, however that happened: it holds gigabytes that nobody needs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(job_file: str, result_file: str, parent: str) -> None:
    """Call the function that the job names; write what it returns."""
    # Told, not asked: the parent may have ended by now. On Windows the launcher of a virtual environment is in between.
    parent_id = int(parent) if os.name == "posix" else os.getppid()
    threading.Thread(target=stop_with, args=[parent_id], daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.path[:] = job["sys_path"]
    value = find(job)(**job["arguments"])
    is_measurement = type(value).__name__ == "Measurement"
    result = {"is_measurement": is_measurement, "value": value.to_dict() if is_measurement else value}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The other side of `helpers.measure.run_in_fresh_process`: a script that calls one function and writes its result.

It imports nothing of ours, so that the process holds what the function loads and nothing else.
"""

import importlib
import json
import sys
from pathlib import Path


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.path[:] = job["sys_path"]
    if "source" in job:
        namespace = {"__name__": "__main__"}
        exec(compile(job["source"], f"<{job['function']}>", "exec"), namespace)
        function = namespace[job["function"]]
    else:
        function = importlib.import_module(job["module"])
        for name in job["function"].split("."):
            function = getattr(function, name)
    value = function(**job["arguments"])
    is_measurement = type(value).__name__ == "Measurement"
    result = {"is_measurement": is_measurement, "value": value.to_dict() if is_measurement else value}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

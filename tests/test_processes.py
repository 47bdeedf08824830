import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import devices, processes
from helpers.checkpoints import CHECKPOINTS
from helpers.errors import TutorialError


def test_function_of_a_notebook_runs_in_another_process(monkeypatch):
    monkeypatch.setenv("SOME_SETTING", "kept")

    def describe(number):
        import os
        import sys

        return {
            "number": 2 * number,
            "pid": os.getpid(),
            "env": os.environ["SOME_SETTING"],
            "torch": "torch" in sys.modules,
        }

    result = processes.run_in_fresh_process(describe, {"number": 21})
    assert result.pop("pid") != os.getpid()
    assert result == {"number": 42, "env": "kept", "torch": False}


def test_function_of_a_module_runs_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "cases.py").write_text("BASE = 40\ndef add(number): return BASE + number\n")
    monkeypatch.syspath_prepend(tmp_path)
    import cases

    assert processes.run_in_fresh_process(cases.add, {"number": 2}) == 42


def test_a_function_travels_with_the_variables_that_it_uses():
    number = 1
    text = np.asarray([1, 2])

    def add():
        return number + text, Path("a")

    result, path = processes.run_in_fresh_process(add)
    assert result.tolist() == [2, 3] and path == Path("a")


def failure_of(function, **options) -> str:
    with pytest.raises(TutorialError) as caught:
        processes.run_in_fresh_process(function, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_failure_in_another_process(capfd):
    def fail():
        print("got this far")
        raise ValueError("no such thing")

    assert failure_of(fail) == "fail failed in its own process: ValueError: no such thing; see the output above."
    captured = capfd.readouterr()
    assert "got this far" in captured.out and "Traceback" in captured.err


def test_failed_measurement_has_its_own_name_and_no_stack_trace(capfd):
    def fail():
        raise RuntimeError('Error: overwritten by a subsequent run. Stack trace: File "/home/reader/model.py", line 1')

    with pytest.raises(TutorialError) as caught:
        processes.measure_in_fresh_process(fail, CHECKPOINTS["flux", "pocket"], "recipe 1")
    sentence = "recipe 1 failed in its own process: RuntimeError: Error: overwritten by a subsequent run"
    assert str(caught.value) == f"{sentence}; see the output above."
    assert "/home/reader/model.py" in capfd.readouterr().err


def test_success_in_another_process_shows_nothing(capfd):
    def noisy():
        import sys

        print("out")
        print("err", file=sys.stderr)
        return 1

    assert processes.run_in_fresh_process(noisy) == 1
    assert capfd.readouterr() == ("", "")


def test_sentence_of_another_process_is_kept():
    def fail():
        class TutorialError(RuntimeError):
            pass

        TutorialError.__module__, TutorialError.__qualname__ = "helpers.errors", "TutorialError"
        raise TutorialError("Install it.")

    assert failure_of(fail) == "Install it."


def test_out_of_memory_in_another_process():
    def fail():
        class OutOfMemoryError(RuntimeError):
            pass

        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    assert "fail ran out of accelerator memory" in failure_of(fail)


def test_killed_process():
    def die():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    assert "SIGKILL" in failure_of(die) and "host memory" in failure_of(die)


def test_process_that_takes_too_long():
    def sleep():

        time.sleep(60)

    assert "sleep did not finish in 1 s" in failure_of(sleep, timeout_s=1)


def load_bf16(path: str, steps: int):
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16)
    return pipeline, {"num_inference_steps": steps, "max_sequence_length": None}


def test_a_pipeline_in_a_fresh_process(tiny_checkpoint, tmp_path):
    settings = replace(CHECKPOINTS["flux", "pocket"], height=32, width=32)
    picture = tmp_path / "picture.png"
    result = processes.measure_in_fresh_process(
        load_bf16, settings, "bf16", {"path": str(tiny_checkpoint), "steps": 2}, repeats=2, picture=picture
    )
    assert (result.name, result.repeats, result.height) == ("bf16", 2, 32)
    assert result.load_s > 0 and result.latency_s > 0 and result.host_peak_gb > 0.2 and result.footprint_gb > 0
    if devices.has_memory_statistics():
        assert 0 <= result.peak_gb <= result.reserved_gb  # 0: this pipeline stays on the host
    else:
        assert result.reserved_gb is None
    pipeline, changes = load_bf16(str(tiny_checkpoint), 2)
    pipeline.set_progress_bar_config(disable=True)
    call = settings.call_arguments | {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    del call["max_sequence_length"]  # None removes it: the pipeline's own 512 tokens count
    np.testing.assert_array_equal(np.asarray(pipeline(**call).images[0]), np.asarray(Image.open(picture)))


def test_a_pipeline_that_fails_in_a_fresh_process(tmp_path):
    with pytest.raises(TutorialError, match="failed in its own process"):
        processes.measure_in_fresh_process(
            load_bf16, CHECKPOINTS["flux", "pocket"], "x", {"path": str(tmp_path), "steps": 1}
        )


def test_a_picture_that_cannot_be_written_costs_no_figure(tmp_path):
    output = SimpleNamespace(images=[Image.new("RGB", (8, 4))])
    drawn = processes._drawn(None, output, tmp_path / "no" / "a.png")
    assert drawn == {"height": 4, "width": 8, "frames": None}

import ast
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook
from torch._inductor import compile_fx
from torch._inductor.fx_passes import fuse_attention

import helpers
from helpers import quiet

FOLDER = Path(helpers.__file__).parent
MODULES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")

SCRIPT = """
import helpers
from helpers import {modules}
cpu_backend.enable()
import bitsandbytes, diffusers, transformers
from conftest import draw, nf4_config
import torch
pipeline = diffusers.DiffusionPipeline.from_pretrained(
    {checkpoint!r}, quantization_config=nf4_config(), dtype=torch.bfloat16
)
pipeline.set_progress_bar_config(disable=True)
draw(pipeline)
"""


def test_importing_loading_and_drawing_prints_nothing(tiny_checkpoint):
    code = SCRIPT.format(modules=", ".join(MODULES), checkpoint=str(tiny_checkpoint))
    path = [str(FOLDER.parent), str(Path(__file__).parent)]
    process = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n" + code], capture_output=True, text=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_other_messages_of_the_same_logger_still_show(caplog):
    for logger, start in quiet.NOISE:
        with caplog.at_level(logging.WARNING):
            logging.getLogger(logger).addHandler(caplog.handler)  # some loggers do not propagate
            caplog.clear()
            logging.getLogger(logger).warning("%s and so on", start)
            assert not caplog.records
            logging.getLogger(logger).warning("A real warning: %s", start)
            assert caplog.records
            logging.getLogger(logger).removeHandler(caplog.handler)


def test_layers_that_were_not_executed_on_a_gpu_are_no_news(caplog):
    hook, model = LazyPrefetchGroupOffloadingHook(), torch.nn.Linear(1, 1)
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    hook._layer_execution_tracker_module_names.add("encoder.embed_tokens")
    logger = logging.getLogger("diffusers.hooks.group_offloading")
    logger.addHandler(caplog.handler)
    hook.post_forward(model, None)
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("module", [compile_fx, fuse_attention])
def test_float32_on_a_gpu_is_no_news(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.install()
        count = len(warnings.filters)
        quiet.install()
        assert len(warnings.filters) == count
        module._warn_tf32_disabled.__wrapped__()
        assert not caught
        warnings.warn("A real warning: TensorFloat32 tensor cores", stacklevel=1)
        assert len(caught) == 1


def test_install_twice_adds_no_second_filter():
    before = [list(logging.getLogger(logger).filters) for logger, _ in quiet.NOISE]
    quiet.install()
    assert [logging.getLogger(logger).filters for logger, _ in quiet.NOISE] == before


@pytest.mark.parametrize("is_terminal", [True, False])
def test_loading_bars_come_back_in_a_terminal(is_terminal, monkeypatch):
    logs = [diffusers.utils.logging, transformers.utils.logging]
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal))
    quiet.show_loading_bars()
    shown = [log.is_progress_bar_enabled() for log in logs]
    quiet.install()
    assert shown == [is_terminal] * 2 and not any(log.is_progress_bar_enabled() for log in logs)


@pytest.mark.parametrize("name", MODULES)
def test_helpers_import_neither_benchmarks_nor_training(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {"benchmarks", "programs", "training", "notebooks", "tools"}
    assert not {module.split(".")[0] for module in imported} & others

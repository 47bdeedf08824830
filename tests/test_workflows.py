"""The workflows of GitHub, as far as that can be known here: they are YAML, and call what the Makefile has."""

import re
import subprocess
from pathlib import Path

import pages
import pytest
import yaml
from notebook_checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent
# BaseLoader leaves the key `on` a word, and the version 3.10 a text.
WORKFLOWS = {path.stem: yaml.load(path.read_text(), yaml.BaseLoader) for path in ROOT.glob(".github/workflows/*.yml")}
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def steps(name):
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def test_what_starts_them():
    assert {name: sorted(workflow["on"]) for name, workflow in WORKFLOWS.items()} == {
        "test": ["pull_request", "push"],
        "weekly": ["schedule", "workflow_dispatch"],
        "pages": ["push", "workflow_dispatch"],
    }
    assert WORKFLOWS["pages"]["on"]["push"] == {"branches": ["main"]}
    assert WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"] == {"python": ["3.11", "3.13"]}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_line_calls_a_target_that_is_there(name):
    lines = [step["run"] for step in steps(name) if "run" in step]
    called = [target for line in lines for target in re.findall(r"^make (\S+)", line, re.MULTILINE)]
    assert called and set(called) <= set(TARGETS)
    for line in lines:
        assert subprocess.run(["bash", "-n"], input=line, text=True).returncode == 0, line


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_action_has_a_version_and_each_job_a_limit(name):
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(name) if "uses" in step)
    assert all(int(job["timeout-minutes"]) <= 90 for job in WORKFLOWS[name]["jobs"].values())
    assert WORKFLOWS[name]["permissions"]["contents"] == "read"


def test_what_is_published_is_what_make_site_writes(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(pages, "build", lambda root, notebooks, target: written.append(target) or [])
    assert pages.main([]) == 0
    (path,) = [step["with"]["path"] for step in steps("pages") if step.get("uses", "").startswith("actions/upload")]
    assert [ROOT / path] == written


def test_the_weekly_run_leaves_out_one_check():
    (line,) = [step["run"] for step in steps("weekly") if step.get("run", "").startswith("make test")]
    assert line == """make test ARGS="-k 'not (test_notebook and environment)'\""""
    assert "environment" in [check.__name__.removeprefix("check_") for check in CHECKS]

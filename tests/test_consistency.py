"""requirements.txt, pyproject.toml, environment.yml, Makefile and README agree, and so does what is installed."""

import re
import tomllib
from collections import Counter
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import records

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages that only the CUDA build of torch brings: pip adds them itself.
CUDA_ONLY = re.compile(r"(nvidia|cuda)-.*|triton")


def read_pins():
    """{name: version} of requirements.txt; anything but `name==version` is a mistake."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        specifier = next(iter(requirement.specifier), None)
        assert specifier and specifier.operator == "==", f"not an exact pin: {line}"
        assert Version(specifier.version).local is None, f"a pin of one build: {line}"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


PINS = read_pins()


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_dependency_is_pinned_in_its_range(text):
    dependency = Requirement(text)
    pin = PINS.get(canonicalize_name(dependency.name))
    assert pin, f"{dependency.name} is in pyproject.toml and not in requirements.txt"
    assert pin in dependency.specifier, f"{dependency.name}: the pin {pin} is outside {dependency.specifier}"


def test_pins_hold_no_cuda_packages():
    assert [name for name in PINS if CUDA_ONLY.fullmatch(name)] == []


def test_installed_versions_are_the_pins():
    problems = []
    for name, pin in PINS.items():
        try:
            installed = Version(version(name)).public  # 2.13.0 of 2.13.0+cpu and of 2.13.0+cu130
        except PackageNotFoundError:
            installed = "not installed"
        if installed != str(Version(pin)):
            problems.append(f"{name}: pinned {pin}, {installed}")
    assert not problems, "Not the pinned set, run `make test`:\n" + "\n".join(problems)


def test_pins_are_complete():
    """Whatever a pinned package needs here is pinned too."""
    needs = set()
    for name in PINS:
        for text in requirements_of(name):
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                needs.add(canonicalize_name(needed.name))
    assert sorted(name for name in needs - set(PINS) if not CUDA_ONLY.fullmatch(name)) == []


def requirements_of(name):
    """What an installed package needs, as its metadata says; nothing if it is not installed."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [item["pip"] for item in environment if isinstance(item, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    plain = [item for item in environment if isinstance(item, str)]
    assert sorted(item.split("=")[0] for item in plain) == ["pip", "python"]
    (python,) = [item.split("=")[1] for item in plain if item.startswith("python=")]
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])


def test_readme_names_commands_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    code = re.findall(r"^```.*?^```|`[^`\n]+`", readme, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code)))
    assert named <= targets, f"The README names targets that the Makefile lacks: {sorted(named - targets)}"
    assert {"run", "lab", "test"} <= named, f"The README does not name all of make run, lab and test: {sorted(named)}"


README_COLUMNS = {
    "load, first call (s)": lambda row: f"{row.load_s + row.first_call_s:.0f}",
    "latency (s)": lambda row: f"{row.latency_s:.1f}",
    "step (s)": lambda row: f"{row.step_ms / 1e3:.3f}",
    "reserved (GB)": lambda row: f"{row.reserved_gb:.1f}",
    "host (GB)": lambda row: f"{row.host_peak_gb:.1f}",
}


def test_readme_results_are_the_recorded_ones():
    readme = (ROOT / "README.md").read_text()
    # Each table stands below the link to its file.
    tables = re.findall(r"\]\((benchmarks/results/.*?\.json)\).*?\n\n((?:\|[^\n]*\n)+)", readme, re.DOTALL)
    assert len(tables) == 2
    for file, table in tables:
        rows = {row.name: row for row in records.load_measurements(ROOT / file)}
        header, _, *lines = [line.strip("| \n").split(" | ") for line in table.splitlines()]
        assert len(lines) >= 3
        for cells in lines:
            row = rows[f"saved nf4, {cells[0]}, regional compile"]
            assert cells[1:] == [README_COLUMNS[column](row) for column in header[1:]]


@pytest.mark.parametrize(
    "pattern",
    [r"\d+(?:\.\d+)?", r"\]\(([^)]+)\)", r"^```\n(.*?)^```", r"`([^`\n]+)`"],
    ids=["figures", "links", "commands", "code"],
)
def test_the_chinese_readme_says_the_same(pattern):
    """Its figures, links, commands and names, each as often as in the English one."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    english, chinese = english.replace("README.zh.md", ""), chinese.replace("README.md", "", 1)
    found = [Counter(re.findall(pattern, text, re.MULTILINE | re.DOTALL)) for text in (english, chinese)]
    if pattern.startswith("^"):  # comments are translated
        found = [Counter(re.sub(r" +#.*", "", block) for block in blocks) for blocks in found]
    assert found[0] == found[1], (found[0] - found[1], found[1] - found[0])


def test_the_readme_is_short():
    words = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if re.search(r"\w", word)]
    assert len(words) <= 900

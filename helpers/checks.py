"""What must be right before a lesson or the benchmark starts: the libraries, a checkpoint's files, the Hub.

Each check ends in one sentence, the same wherever it is made.
"""

import contextlib
import json
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, auth_check, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open

from helpers import files
from helpers.errors import TutorialError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
# What a lesson computes with. The other dependencies of this package are for Jupyter and the tests.
MODEL_LIBRARIES = ("accelerate", "bitsandbytes", "diffusers", "huggingface-hub", "safetensors", "torch", "transformers")
ANOTHER = "give another checkpoint"
OTHER_CACHE = "set HF_HOME to another folder"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
# What a component has, by a pattern of the name of its class: one file of each row. The first that fits counts.
FILES = {
    "Scheduler": [("scheduler_config.json",)],
    "ByT5Tokenizer": [("tokenizer_config.json",)],  # its words are bytes
    "Tokenizer": [("tokenizer_config.json",), VOCABULARIES],
    "Processor|FeatureExtractor": [("preprocessor_config.json", "*processor_config.json")],
    "Guidance": [("guider_config.json",)],
    "": [("config.json",), ("*.safetensors", "*.bin")],
}


class _Fault(Exception):
    """What is wrong with a file, in a few words."""


def find_fault(folder: Path) -> str | None:
    """What is missing or broken in a checkpoint folder in diffusers format; None if it is complete.

    It reads the names of all files, the JSON files and the headers of the weights: a moment at any size.
    """
    try:
        for name, entry in _read_json(folder / "model_index.json").items():
            # A component is [library, class]; [null, null] is one that this pipeline does without.
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
                if not (folder / name).is_dir():
                    raise _Fault(f"{name}/ is missing")
                _check_component(folder / name, kind=entry[1])
    except _Fault as fault:
        return str(fault)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read, {files.reason(error)}"
    return None


def _check_component(folder: Path, kind: str) -> None:
    """Raise _Fault if a file of a component of the class `kind` is missing or broken."""
    here = f"{folder.name}/"
    for row in next(rows for pattern, rows in FILES.items() if re.search(pattern, kind)):
        if not any(file.is_file() for pattern in row for file in folder.glob(pattern)):
            raise _Fault(f"{here}{row[0]} is missing")
    for file in sorted(folder.glob("*.json")):
        content = _read_json(file, here, (dict, list))
        if ".index" in file.name:
            shards = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(shards, dict):
                raise _Fault(f"{here}{file.name} cannot be read")
            for shard in sorted(set(shards.values())):
                if not (folder / shard).is_file():
                    raise _Fault(f"{here}{shard} is missing")
    # Without safetensors, diffusers and transformers read the older *.bin.
    for file in sorted(folder.glob("*.safetensors")) or folder.glob("*.bin"):
        if not (_is_whole(file) if file.suffix == ".safetensors" else file.stat().st_size):
            raise _Fault(f"{here}{file.name} is cut short")


def _read_json(file: Path, here: str = "", kinds: type | tuple[type, ...] = dict) -> Any:
    """What a JSON file holds, which must be of one of the `kinds`; `here` stands before its name in the fault."""
    if not file.is_file():
        raise _Fault(f"{here}{file.name} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, kinds):
        raise _Fault(f"{here}{file.name} cannot be read")
    return content


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with file.open("rb"), contextlib.suppress(SafetensorError):  # safe_open calls a file missing that it may not read
        with safe_open(file, "np"):
            return True
    return False


def find_on_hub(repo_id: str, instead: str = ANOTHER) -> str:
    """Folder of `repo_id` in the local cache if all of it is there, else `repo_id`, once a download can succeed.

    Raises TutorialError if it cannot; `instead` is the way out that needs no download.
    """
    try:
        folder = snapshot_download(repo_id, local_files_only=True)
        if find_fault(Path(folder)) is None:
            return folder  # needs no network, no token and no space
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise TutorialError(f"{repo_id!r} is no repository id, which would be owner/name: {instead}.") from None

    with hub_errors(repo_id, instead):
        auth_check(repo_id)
        # A pipeline loads from subfolders, not single-file weights; and one format of several, where there are several.
        wanted = [(file, size) for file, size in hub_files(repo_id) if "/" in file]
        main = [entry for entry in wanted if entry[0].endswith(".safetensors") and ".fp16" not in entry[0]]
        missing = [size for file, size in main or wanted if not isinstance(try_to_load_from_cache(repo_id, file), str)]
    cache = Path(constants.HF_HUB_CACHE)
    files.check_writable(cache, f"{OTHER_CACHE}, or {instead}")
    files.check_space(cache, sum(missing), repo_id, f"set HF_HOME to a folder on a larger disk, or {instead}")
    return repo_id


def hub_files(repo_id: str) -> list[tuple[str, int]]:
    """Name and size in bytes of each file of a repository. Call it, as the Hub in general, within `hub_errors`."""
    siblings = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    return [(file.rfilename, file.size or 0) for file in siblings]


@contextlib.contextmanager
def hub_errors(repo_id: str, instead: str = ANOTHER) -> Iterator[None]:
    """Whatever the Hub, or the way to it, refuses in the block ends in one sentence: a TutorialError."""
    token = get_token()
    log_in = f"log in again with `hf auth login`, or {instead}"
    accept = f"accept its licence at https://huggingface.co/{repo_id}"
    gated = f"your account has not accepted its licence: {accept}"
    if token is None:
        gated = f"you are not logged in: {accept} and log in with `hf auth login`"
    elif not re.fullmatch(r"[!-~]+", token):
        raise TutorialError(f"Your token for the Hub has characters that no token has: {log_in}.")
    sentences = {  # the first one that fits
        GatedRepoError: f"{repo_id} is gated and {gated}, or {instead}.",
        RepositoryNotFoundError: f"The Hub does not show {repo_id} to you, because there is none or your token is "
        f"missing or invalid: check the name, {log_in}.",
        RemoteEntryNotFoundError: f"{repo_id} is no diffusers pipeline, without model_index.json: {instead}.",
        OfflineModeIsEnabled: f"{repo_id} is not complete in the local cache and offline mode is on: unset "
        f"HF_HUB_OFFLINE to download it, or {instead}.",
    }
    try:
        yield
    except tuple(sentences) as error:
        raise TutorialError(next(text for kind, text in sentences.items() if isinstance(error, kind))) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise TutorialError(f"The Hub refuses your token for {repo_id} (status {status}): {log_in}.") from None
        raise TutorialError(f"The Hub fails for {repo_id} (status {status}): try again later, or {instead}.") from None
    # OSError, and the base error of the HTTP library that huggingface_hub uses (httpx or requests, by version).
    except HfHubHTTPError.__bases__ as error:
        is_network = isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
        if isinstance(error, OSError) and not is_network and error.errno in files.REASONS:
            place = error.filename or constants.HF_HUB_CACHE
            raise files.cannot_write(place, error, f"{OTHER_CACHE}, or {instead}") from None
        raise TutorialError(
            f"{repo_id} is not complete in the local cache and the Hub cannot be reached ({type(error).__name__}): "
            f"check the network and try again, or {instead}."
        ) from None


def check_versions() -> None:
    """Check that the libraries in MODEL_LIBRARIES are in the ranges of `pyproject.toml`.

    Raises TutorialError if one is missing, too old, or too new.
    """
    for requirement in _requirements():
        marker = requirement.marker
        if requirement.name not in MODEL_LIBRARIES or (marker and not marker.evaluate({"extra": ""})):
            continue
        needed = f"{requirement.name}{requirement.specifier}"
        command = f'run `python -m pip install --upgrade "{needed}"` and restart the kernel'
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            raise TutorialError(f"{requirement.name} is not installed: {command}.") from None
        if not requirement.specifier.contains(found, prereleases=True):
            raise TutorialError(f"{requirement.name} {found} is installed and the lessons need {needed}: {command}.")


def _requirements() -> list[Requirement]:
    """The dependencies of this package: from `pyproject.toml` in a clone, else from the installation's metadata."""
    pyproject = PACKAGE_ROOT / "pyproject.toml"
    if pyproject.is_file():
        dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("dependencies", [])
    else:
        distributions = metadata.packages_distributions().get("helpers", [])
        dependencies = metadata.requires(distributions[0]) or [] if distributions else []
    return [Requirement(dependency) for dependency in dependencies]

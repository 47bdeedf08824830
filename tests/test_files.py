"""Files that cannot be written: the sentence, the old file, what is printed."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import message_of

from benchmarks import writing
from helpers import activity, files
from helpers.records import Measurement


def refuse(number):
    def write(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize("number", files.REASONS)
def test_the_sentence_says_what_is_wrong(number):
    text = str(files.cannot_write("a.json", OSError(number, os.strerror(number)), "name another folder"))
    assert text.startswith(f"a.json cannot be written ({files.REASONS[number]}): ") and text.endswith("folder.")
    assert ("free some space" in text) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_what_only_the_error_knows_is_kept():
    assert files.reason(OSError(errno.ENOENT, "No usable temporary directory found")).startswith("No usable")
    assert files.reason(OSError(errno.EIO, os.strerror(errno.EIO))) == os.strerror(errno.EIO)
    assert files.reason(OSError("only words")) == "only words"


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    files.check_writable(tmp_path / "a" / "b", "choose another folder")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_where_the_folder_must_be(tmp_path):
    (tmp_path / "a").touch()
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        text = message_of(files.check_writable, folder, "choose another folder")
        assert "a file stands where a folder must be" in text


def test_a_failed_write_leaves_the_old_file_and_prints_what_is_new(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    old, new = Measurement("old"), Measurement("new", latency_s=1.5)
    writing.save_measurements([old], path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", refuse(errno.ENOSPC))
    assert "the disk is full" in message_of(writing.save_measurements, [old, new], path, [new])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["new"]
    message_of(writing.save_measurements, [old, new], path)  # not told what is new: all of it
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["old", "new"]
    recording = {"a": [activity.Activity("compute", 0.0, 1.0)]}
    assert "the disk is full" in message_of(writing.save_activities, recording, path, 0.0, 2.0)
    assert json.loads(capsys.readouterr().out)["recordings"]["a"]["compute"] == [[0.0, 1.0]]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder(tmp_path):
    assert "(its folder is missing)" in message_of(files.write_text, tmp_path / "no" / "a.json", "text")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (49, "49 bytes"), (50, "0.1 kB"), (1.2e6, "1.2 MB"), (4.9e7, "49.0 MB"), (3.3e10, "33.0 GB")],
)
def test_no_size_is_rounded_to_nothing(number, text):
    assert files.size(number) == text


def test_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4e6))
    files.check_space(tmp_path / "not" / "there", 4e6, "It", "set HF_HOME")
    text = message_of(files.check_space, tmp_path / "not" / "there", 5e6, "It", "set HF_HOME")
    assert text == f"It needs 5.0 MB of disk and {tmp_path} has 4.0 MB free: free some space or set HF_HOME."

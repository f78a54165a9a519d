"""Files that vouch for themselves: what `seal` and `describe_files` wrote is read back, and nothing else."""

import json

import pytest

from dinosr_hf.training.resume import CheckpointError
from dinosr_hf.training.sealed_files import check_files, describe_files, read_sealed, seal

CONTENT = {"step": 3, "rate": 1e-3, "names": ("a", "é\ud800"), "none": None, "nested": {"1": [True, 2.5]}}


def test_sealed_content_is_read_back(tmp_path):
    (tmp_path / "state.json").write_text(seal(CONTENT))
    assert read_sealed(tmp_path / "state.json") == json.loads(json.dumps(CONTENT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read|is not what was written"),
        ("[]", "is not what was written"),
        ('{"step": 3}', "is not what was written: its SHA-256 differs, or it has none"),
        (seal(CONTENT).replace('"step": 3', '"step": 4'), "is not what was written"),
        (seal(CONTENT).replace('"step": 3', '"step": 3, "more": 1'), "is not what was written"),
        (seal(CONTENT)[:-20], "cannot be read"),
    ],
    ids=["empty", "list", "unsealed", "changed", "added", "cut"],
)
def test_changed_content_is_refused(tmp_path, text, message):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_sealed(tmp_path / "state.json")
    with pytest.raises(CheckpointError, match=r"has no other\.json: it is unfinished"):
        read_sealed(tmp_path / "other.json")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "part").mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"weights")
    (folder / "part" / "b.pt").write_bytes(b"more")
    (tmp_path / "outside.pt").write_bytes(b"weights")
    return folder


def test_described_files_are_accepted(folder):
    described = describe_files(folder)
    assert described.keys() == {"a.pt", "part/b.pt"} and described["a.pt"]["bytes"] == 7
    check_files(folder, json.loads(json.dumps(described)))
    link = folder.with_name("link")
    link.symlink_to(folder)
    check_files(link, described)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.pt", "which is a link or outside the folder"),
        ("{absolute}", "which is a link or outside the folder"),
        ("part/../a.pt", "which is a link or outside the folder"),
        ("link.pt", "which is a link or outside the folder"),
        ("a\0.pt", r"lists a\\x00\.pt, which is a link or outside"),
        ("missing.pt", r"lacks missing\.pt"),
        ("part", "lacks part"),
    ],
)
def test_files_elsewhere_are_refused(folder, name, message):
    outside = folder.with_name("outside.pt")
    (folder / "link.pt").symlink_to(outside)
    entry = describe_files(folder)["a.pt"]
    with pytest.raises(CheckpointError, match=message):
        check_files(folder, {name.format(absolute=outside): entry})


@pytest.mark.parametrize("described", [None, [], 3, {"a.pt": 3}, {"a.pt": {}}, {"a.pt": {"bytes": 7}}], ids=repr)
def test_lists_of_files_that_are_none_are_refused(folder, described):
    with pytest.raises(CheckpointError, match=r"has no list of its files|instead of None|is not what was written"):
        check_files(folder, described)

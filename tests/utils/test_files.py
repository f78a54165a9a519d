"""Atomic files and folders: complete or unchanged, whatever interrupts the writing."""

import os
import signal
import stat

import pytest
from matplotlib.figure import Figure
from safetensors.torch import save_file

import forks
from dinosr_hf.analysis.plots import save_figure
from dinosr_hf.utils.files import (
    TEMPORARY_PREFIX,
    atomic_file,
    atomic_folder,
    claim_output_file,
    claim_output_folder,
    flush_to_disk,
    lock_folder,
    remove,
    temporary_path,
    write_atomically,
)
from disk import names


def write_and_fail(path):
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("no space left on device")


@pytest.mark.parametrize("content", ["käse\n", b"k\xe4se\r\n"], ids=["text", "bytes"])
def test_content_is_written_as_it_is(tmp_path, content):
    path = write_atomically(str(tmp_path / "a.txt"), content)
    assert path == tmp_path / "a.txt"
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with atomic_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
        assert names(tmp_path) == sorted([temporary.name, "a.txt"]) and temporary.name.startswith(TEMPORARY_PREFIX)
    assert path.read_text() == "after" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("before", [None, "before"], ids=["new", "existing"])
def test_a_failed_write_changes_nothing(tmp_path, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(OSError, match="no space left"):
        write_and_fail(path)
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


KILLED = """
import os, signal, sys
from dinosr_hf.utils.files import atomic_file, atomic_folder
with atomic_file(sys.argv[1]) as file, atomic_folder(sys.argv[2]) as folder:
    file.write_text("half")
    (folder / "b.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_replaced_by_the_next(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    for _ in range(2):  # at most one leftover of each, however often
        done = forks.run(["-c", KILLED, file, folder])
        assert done.returncode == -signal.SIGKILL
        assert names(tmp_path) == sorted([temporary_path(file).name, temporary_path(folder).name])
    write_atomically(file, "whole")
    with atomic_folder(folder) as temporary:
        (temporary / "c.txt").write_text("whole")
    assert names(tmp_path) == ["a.txt", "folder"] and names(folder) == ["c.txt"]


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_link_is_replaced_and_never_written_through(tmp_path, target):
    (tmp_path / "victim").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.txt", "b.txt", "c.png"):
        (out / name).symlink_to(tmp_path / target)
    write_atomically(out / "a.txt", "new")
    with atomic_folder(out) as temporary:
        (temporary / "b.txt").write_text("new")
    save_figure(Figure(), out / "c.png")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "a.txt").read_text() == (out / "b.txt").read_text() == "new"
    assert names(tmp_path) == ["out", "victim"] and (tmp_path / "victim").read_text() == "mine"


def test_a_link_to_a_folder_is_followed_if_there_is_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a.txt").touch()
    assert names(tmp_path / "disk") == ["a.txt"] and (tmp_path / "out").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with (
        pytest.raises(FileNotFoundError, match=r"link to a folder that does not exist.*dangling"),
        atomic_folder(tmp_path / "dangling"),
    ):
        pytest.fail("nothing may be written")
    assert names(tmp_path) == ["dangling", "disk", "out"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "loop"])
@pytest.mark.parametrize("writes", ["file", "folder"])
def test_whatever_is_at_the_temporary_name_is_replaced(tmp_path, kind, writes):
    path = tmp_path / "a"
    leftover = temporary_path(path)
    if kind == "folder":
        (leftover / "deep").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(leftover)
    else:
        leftover.symlink_to(leftover if kind == "loop" else tmp_path / "nothing")
    if writes == "file":
        assert write_atomically(path, "new").read_text() == "new"
    else:
        with atomic_folder(path) as temporary:
            (temporary / "b").touch()
        assert names(path) == ["b"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, kind):
    victim = tmp_path / "victim"
    path = tmp_path / "out" / "a"
    path.parent.mkdir()
    if kind == "file":
        victim.write_text("mine")
        temporary_path(path).symlink_to(victim)
        write_atomically(path, "new")
        assert victim.read_text() == "mine" and path.read_text() == "new"
    else:
        victim.mkdir()
        (victim / "mine.txt").touch()
        temporary_path(path).symlink_to(victim)
        with atomic_folder(path) as temporary:
            (temporary / "new.txt").touch()
        assert names(victim) == ["mine.txt"] and names(path) == ["new.txt"]
    assert not path.is_symlink() and names(path.parent) == ["a"]


def test_the_temporary_file_is_created_exclusively(tmp_path, monkeypatch):
    # As if someone planted a link between the removal of the leftover and the creation.
    (tmp_path / "victim").write_text("mine")
    path = tmp_path / "a.txt"
    monkeypatch.setattr("dinosr_hf.utils.files.remove", lambda temporary: temporary.symlink_to(tmp_path / "victim"))
    with pytest.raises(FileExistsError):
        write_atomically(path, "new")
    assert (tmp_path / "victim").read_text() == "mine" and not path.exists()


def write_file(path):
    with atomic_file(path) as temporary:
        save_file({}, temporary)  # which makes a file that only its owner can read


def write_folder(path):
    with atomic_folder(path) as temporary:
        save_file({}, temporary / "weights.safetensors")


def test_disks_without_permissions_take_files(tmp_path, monkeypatch):
    def refuse(path, mode, **options):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(os, "chmod", refuse)
    write_atomically(tmp_path / "a.txt", "a")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "b.txt").write_text("b")
    assert names(tmp_path) == ["a.txt", "folder"]
    assert names(tmp_path / "folder") == ["b.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "weights.safetensors")
        write_folder(tmp_path / "new")
        (tmp_path / "existing").mkdir()
        write_folder(tmp_path / "existing")
        with lock_folder(tmp_path / "locked"):
            assert stat.S_IMODE((tmp_path / "locked" / ".lock").stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)
    for file in (tmp_path, tmp_path / "new", tmp_path / "existing"):
        assert stat.S_IMODE((file / "weights.safetensors").stat().st_mode) == 0o666 & ~umask
    for folder in ("new", "locked"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o777 & ~umask


def test_a_folder_for_a_group_passes_its_group_on(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    group = next((group for group in os.getgroups() if group != shared.stat().st_gid), shared.stat().st_gid)
    os.chown(shared, -1, group)
    shared.chmod(0o2775)
    write_file(shared / "weights.safetensors")
    write_folder(shared / "new")
    with lock_folder(shared / "locked"):
        pass
    for path in shared.rglob("*"):
        assert path.stat().st_gid == group
        assert path.is_file() or path.stat().st_mode & stat.S_ISGID


def test_the_longest_names_can_be_written(tmp_path):
    name = "ä" * 127  # 254 bytes; file systems allow 255
    assert write_atomically(tmp_path / name, "text").read_text() == "text"
    with atomic_folder(tmp_path / "b" / name) as temporary:
        (temporary / name).touch()
    assert names(tmp_path / "b" / name) == [name]
    assert temporary_path(tmp_path / "a") != temporary_path(tmp_path / "b")


def test_a_new_folder_appears_with_its_parents_when_it_is_complete(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic_folder(folder) as temporary:
        (temporary / "a.txt").touch()
        assert not folder.exists()
    assert names(folder) == ["a.txt"] and names(folder.parent) == ["folder"]


def test_an_existing_folder_keeps_other_files(tmp_path):
    for name in ("a.txt", "mine.txt"):
        (tmp_path / name).write_text("before")
    with atomic_folder(tmp_path) as temporary:
        (temporary / "a.txt").write_text("after")
        assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt", "mine.txt"]
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["after", "before"]


@pytest.mark.parametrize("target", [".", "new"])
def test_a_failed_folder_changes_nothing(tmp_path, target):
    def write_and_interrupt():
        with atomic_folder(tmp_path / target) as temporary:
            (temporary / "a.txt").write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "before"


def test_flush_and_remove(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    flush_to_disk(tmp_path)
    flush_to_disk(tmp_path / "file")
    remove(tmp_path / "link")
    assert names(tmp_path) == ["file", "folder"]  # the link, not what it points to
    for name in ("file", "folder", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == []


def test_only_an_own_output_folder_is_emptied(tmp_path):
    folder = claim_output_folder(tmp_path / "deep" / "runs", ".mine")
    (folder / "old").mkdir()
    assert claim_output_folder(folder, ".mine") == folder and names(folder) == [".mine"]
    with pytest.raises(ValueError, match="runs has files of something else, which stay"):
        claim_output_folder(folder, ".others")
    assert names(folder) == [".mine"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    assert claim_output_file(tmp_path / "deep" / "page.html") == tmp_path / "deep" / "page.html"
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == []
    (tmp_path / "file").touch()
    problems = {
        tmp_path / "deep": "Is a directory",
        tmp_path / "file" / "page.html": "File exists|Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        "/proc/page.html": "No such file or directory",
    }
    for path, problem in problems.items():
        with pytest.raises(ValueError, match=rf"^{path} cannot be written to: ({problem})\. Give another name\.$"):
            claim_output_file(path)

"""Files and folders that appear complete or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from .command_line import ArgumentError

# Files being written have names that begin with this, in the folder of the finished file.
TEMPORARY_PREFIX = ".unfinished-"


def flush_to_disk(path: str | os.PathLike) -> None:
    """Flush a file's content, or the names in a folder, to the disk; a no-op for folders that have no flush."""
    is_folder = os.path.isdir(path)
    if is_folder and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks flush no folders
            raise
    finally:
        os.close(descriptor)


def temporary_path(path: str | os.PathLike) -> Path:
    """
    Return the path under which a file or folder is written before it gets its own.

    The name is short whatever the length of the final one, and always the same, so a killed process leaves at most
    one such file, which the next attempt replaces.
    """
    path = Path(path)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f"{TEMPORARY_PREFIX}{digest}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_permissions(path: Path, permissions: int) -> None:
    """Set the permissions of a file; disks that have none to set (SMB, exFAT, those of Windows in WSL) refuse."""
    with contextlib.suppress(PermissionError):
        path.chmod(permissions)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write a file atomically: on the disk it is complete, or as it was before the block.

    Yields the path of an empty temporary file in the same folder, which must exist, to write to. It is created
    exclusively, never through a link, with the permissions that the umask leaves. When the block ends it is flushed
    and renamed to `path`, which replaces a link there, and not what it points to. If the block raises, it is removed.
    """
    path = Path(path)
    temporary = temporary_path(path)
    remove(temporary)  # from a process that was killed
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    permissions = temporary.stat().st_mode
    try:
        yield temporary
        _set_permissions(temporary, permissions)  # safetensors makes a file of its own, that only the owner can read
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except BaseException:
        remove(temporary)
        raise


def write_atomically(path: str | os.PathLike, content: str | bytes) -> Path:
    """
    Write text (as UTF-8) or bytes to a file that is complete or as it was before; return its path.

    Surrogates, as of a file's name that is not UTF-8, become escapes such as `\\udcff`, which JSON reads back.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Write files into a folder atomically: a new folder, whose parents are created, appears complete or not at all.

    Yields the path of an empty temporary folder on the same disk, to write files to. If `folder` exists, each file is
    replaced atomically when the block ends, and files of other names stay. If the block raises, nothing changes. A
    link to a folder is followed, but a file that is a link is replaced.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    if is_new and folder.is_symlink():
        raise FileNotFoundError(errno.ENOENT, "It is a link to a folder that does not exist", str(folder))
    # Inside an existing folder: it may be a mount or a link, on another disk than its parent.
    temporary = temporary_path(folder) if is_new else folder / temporary_path(folder).name
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)  # from a process that was killed
    temporary.mkdir()
    permissions = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            if file.is_file():
                _set_permissions(file, permissions)  # safetensors makes files that only the owner can read
                flush_to_disk(file)
        if is_new:
            flush_to_disk(temporary)
            temporary.rename(folder)
        else:
            for file in files:
                file.replace(folder / file.name)
        flush_to_disk(folder.parent if is_new else folder)
    finally:
        remove(temporary)


def lock_folder(folder: str | os.PathLike, process: int = 0) -> AcquireReturnProxy:
    """
    Create a folder of results and lock it for a process of a run, until the end of `with`, or of the lock's `release`.

    Raises `ArgumentError` if another run has locked it, and in the main process, 0, also if another process of one
    has; or if it cannot be written to. A link in the place of the lock's file is not followed.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / (f".lock-{process:03}" if process else ".lock")).acquire(timeout=0)
            undo.callback(lock.lock.release)
            for other in [] if process else folder.glob(".lock-*"):
                FileLock(other).acquire(timeout=0).lock.release()
        except Timeout as error:
            raise ArgumentError(
                f"Another run is using output_dir={folder} ({Path(error.lock_file).name} is locked). Give another"
                " folder, or end that run (an interrupted `accelerate launch` can leave its processes behind)."
            ) from error
        except OSError as error:
            raise ArgumentError(f"output_dir={folder} cannot be written to: {error}") from error
        undo.pop_all()
    return lock


def claim_output_file(path: str | os.PathLike) -> Path:
    """
    Return the path of a file that a script will write after long work; create its folder.

    Raises `ValueError` if it cannot be written: a folder has its name, or its folder takes no files.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written to: {error.strerror}. Give another name.") from error
    return path


def claim_output_folder(folder: str | os.PathLike, marker: str) -> Path:
    """
    Empty a folder for a script's results, or create it, and return its path.

    The file named `marker` marks a folder as the script's; raises `ValueError` for files in a folder without it.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} has files of something else, which stay. Give another --output_dir.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / marker).touch()
    return folder

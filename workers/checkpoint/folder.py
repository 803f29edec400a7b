"""A folder that is there whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from search.errors import BitfrontierError, Conflict, InvalidRequest

Ours = Callable[[Path], bool]
"""Whether a folder that holds something is one that was written here."""

SPARE_BYTES = 2**26
"""Of the disk, so much is left free."""


class CannotWrite(BitfrontierError):
    """A folder cannot be written."""

    type = "cannot-write"
    title = "The folder cannot be written"


@contextmanager
def whole_folder(folder: Path, *, ours: Ours = lambda _: False, overwrite: bool = False) -> Iterator[Path]:
    """Within, an empty folder beside `folder`, on the same disk, that takes its place at the end.

    Where it ends otherwise, `folder` is as before. What a killed process left is cleared by the next one. A folder that
    holds something is replaced with `overwrite`, if it is one of `ours`.
    Raises InvalidRequest for a place that is taken, Conflict while another process writes there, CannotWrite where this
    one may not.
    """
    folder = Path(os.path.realpath(folder.expanduser()))
    check_place(folder, ours, overwrite=overwrite)
    unfinished, replaced = (folder.parent / f".{folder.name}.{what}" for what in ("unfinished", "replaced"))
    with _held(unfinished, folder):
        try:
            with writing(folder):
                _finish(folder, replaced, ours)
                check_place(folder, ours, overwrite=overwrite)
                _clear(unfinished)
            yield unfinished
            with writing(folder):
                _put(unfinished, folder, replaced, ours, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def check_place(folder: Path, ours: Ours, *, overwrite: bool) -> None:
    """Raise InvalidRequest unless `folder` may be written."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise _taken(f"{folder} is a file", folder, "a folder that does not exist yet")
    if folder.is_mount():
        raise _taken(f"{folder} is where a disk is mounted, and cannot be put there whole", folder, "a folder in it")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise _taken(f"{folder} exists and is not empty", folder, "another folder, or --overwrite to replace it")
    if not ours(folder):
        raise _other(folder)


def check_room(folder: Path, needed: int) -> None:
    """Raise CannotWrite where the disk that `folder` lies on, or will, has no room for so many bytes."""
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
    if needed + SPARE_BYTES > free:
        raise CannotWrite(
            f"the checkpoint takes {needed / 1e9:.2f} GB of the disk of {folder.parent}, where {free / 1e9:.2f} GB are "
            f"free: {(needed + SPARE_BYTES - free) / 1e9:.2f} GB short",
            field="output",
            value=str(folder),
            accepted="a folder on a disk with more room",
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into CannotWrite."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        where = folder.parent
        raise CannotWrite(f"{where} cannot be written to: {reason}", field="output", value=str(where)) from error


@contextmanager
def _held(unfinished: Path, folder: Path) -> Iterator[None]:
    """Hold the folder that is written to, for this process alone; the kernel lets go of it when the process ends."""
    with writing(folder):
        descriptor = _opened(unfinished, folder)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(descriptor).st_ino == unfinished.lstat().st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError:
            held = True  # a file system without locks
        if not held:
            raise Conflict(f"another process is writing {folder} at this moment", field="output", value=str(folder))
        yield
    finally:
        os.close(descriptor)


def _opened(unfinished: Path, folder: Path) -> int:
    """A descriptor of the folder that is written to: a new one, or what a process of this user left of one."""
    try:
        unfinished.mkdir(parents=True)
    except FileExistsError:
        found = unfinished.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise _in_the_way(unfinished, folder) from None
    return os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _put(unfinished: Path, folder: Path, replaced: Path, ours: Ours, *, overwrite: bool) -> None:
    """Give `folder` what is finished. What came there in the meantime is as much in the way as what was there."""
    for file in unfinished.rglob("*"):
        if file.is_file():
            _sync(file)
    check_place(folder, ours, overwrite=overwrite)
    if overwrite and folder.exists():
        _drop(replaced)
        folder.rename(replaced)
        if any(replaced.iterdir()) and not ours(replaced):
            replaced.rename(folder)
            raise _other(folder)
    # Where something lies, and was not moved aside, the system refuses to put a folder.
    unfinished.rename(folder)
    _sync(folder.parent)
    _drop(replaced)


def _finish(folder: Path, replaced: Path, ours: Ours) -> None:
    """Put back what a process had moved aside that was killed between the two steps of `_put`."""
    if not os.path.lexists(replaced):
        return
    if replaced.is_symlink() or not replaced.is_dir() or not ours(replaced):
        raise _in_the_way(replaced, folder)
    if not folder.exists() or not any(folder.iterdir()):
        replaced.rename(folder)


def _drop(replaced: Path) -> None:
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _other(folder: Path) -> InvalidRequest:
    return _taken(
        f"{folder} holds something else than a checkpoint that 'apply' wrote, and is not overwritten",
        folder,
        "another folder",
    )


def _in_the_way(found: Path, folder: Path) -> InvalidRequest:
    return _taken(
        f"{found} is not what 'apply' would have left, and is needed to write {folder.name}",
        folder,
        "another folder, or to move that away",
    )


def _taken(detail: str, folder: Path, accepted: str) -> InvalidRequest:
    return InvalidRequest(detail, field="output", value=str(folder), accepted=accepted)

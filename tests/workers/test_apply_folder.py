"""A folder is there whole or not at all, whatever happens to whoever writes it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from search.errors import Conflict, InvalidRequest
from workers.checkpoint.folder import CannotWrite, check_room, whole_folder

HOLDING = """
import sys, time
from pathlib import Path
from workers.checkpoint.folder import whole_folder
with whole_folder(Path(sys.argv[1]), ours=lambda _: True, overwrite=True) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def write(folder: Path, name: str, **options: object) -> None:
    with whole_folder(folder, **options) as made:  # type: ignore[arg-type]
        (made / name).write_text(name)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing `out`."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_it_takes_its_place_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as made:
        (made / "file").write_text("text")
        assert not out.exists()
    assert names(out) == ["file"]
    assert names(out.parent) == ["out"]


def test_an_empty_folder_may_be_there_before(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "file")
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_nothing(tmp_path: Path, ending: type[BaseException]) -> None:
    with pytest.raises(ending), whole_folder(tmp_path / "out") as made:  # noqa: PT012
        (made / "half").write_text("half")
        raise ending
    assert names(tmp_path) == []


def test_what_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(InvalidRequest, match="not empty") as refused:
        write(out, "new")
    assert "--overwrite" in refused.value.accepted
    with pytest.raises(InvalidRequest, match="something else"):
        write(out, "new", overwrite=True)
    assert names(out) == ["old"]
    with pytest.raises(RuntimeError), whole_folder(out, ours=lambda _: True, overwrite=True):
        raise RuntimeError
    assert names(out) == ["old"]
    write(out, "new", ours=lambda folder: (folder / "old").exists(), overwrite=True)
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidRequest, match="is a file"):
        write(tmp_path / "out", "new", ours=lambda _: True, overwrite=True)


def test_where_no_folder_can_be_made_the_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CannotWrite, match="Not a directory"):
        write(tmp_path / "file" / "out", "new")


def test_a_killed_process_leaves_no_half_and_the_next_one_clears_up(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    other.send_signal(signal.SIGKILL)
    other.wait(60)
    assert not out.exists()
    write(out, "file")
    assert names(out) == ["file"]
    assert names(tmp_path) == ["out"]


def test_two_do_not_write_the_same_folder_at_once(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(Conflict, match="another process"):
        write(tmp_path / "out", "mine")
    assert other.poll() is None
    assert (tmp_path / ".out.unfinished" / "half").exists()


@pytest.mark.parametrize("renamed", [True, False])
def test_a_replacement_that_was_cut_off_loses_neither_folder(tmp_path: Path, renamed: bool) -> None:
    out, aside = tmp_path / "out", tmp_path / ".out.replaced"
    write(out, "old")
    out.rename(aside)
    if renamed:
        out.mkdir()
        (out / "new").touch()
    with pytest.raises(InvalidRequest, match="not empty"):
        write(out, "newest", ours=lambda _: True)
    assert names(out) == (["new"] if renamed else ["old"])
    write(out, "newest", ours=lambda _: True, overwrite=True)
    assert (names(out), names(tmp_path)) == (["newest"], ["out"])


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_arrives_while_it_is_written_is_kept(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"

    def arrive(made: Path) -> None:
        (made / "file").touch()
        out.mkdir()
        (out / "letter").write_text("dear")

    with (
        pytest.raises(InvalidRequest, match="something else" if overwrite else "not empty"),
        whole_folder(out, ours=lambda folder: not (folder / "letter").exists(), overwrite=overwrite) as made,
    ):
        arrive(made)
    assert (names(out), names(tmp_path)) == (["letter"], ["out"])


@pytest.mark.parametrize("what", ["unfinished", "replaced"])
def test_a_link_in_the_place_of_what_is_left_behind_is_not_followed(tmp_path: Path, what: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").touch()
    (tmp_path / f".out.{what}").symlink_to(home)
    with pytest.raises(InvalidRequest, match=f"{what} is not what 'apply' would have left"):
        write(tmp_path / "out", "file", ours=lambda _: True, overwrite=True)
    assert names(home) == ["letter"]
    assert not (tmp_path / "out").exists()


def test_only_a_folder_of_ours_is_taken_for_what_a_replacement_left(tmp_path: Path) -> None:
    aside = tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "letter").touch()
    with pytest.raises(InvalidRequest, match="would have left"):
        write(tmp_path / "out", "file")
    assert (names(aside), names(tmp_path)) == (["letter"], [".out.replaced"])


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    check_room(tmp_path / "out", 900_000_000)
    with pytest.raises(CannotWrite, match=r"takes 1.00 GB .* 1.00 GB are free: 0.07 GB short"):
        check_room(tmp_path / "out", 1_000_000_000)

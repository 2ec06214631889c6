"""Tests of whole files and folders: killed at any moment, on a full disk, and beside what others made."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_disk import small_disk

from deer_vla_ros import files
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import remove_leftovers, whole_file, whole_folder, write_text

PARTS = ("one", "two")
MOST = 2**16
"""Bytes of a file that the operating system allows in `full_disk`."""


def write_folder(path, content):
    with whole_folder(path) as made:
        made.mkdir()
        for part in PARTS:
            (made / part).write_text(content)


def write_file(path, content):
    with whole_file(path) as made:
        made.write_text(content)


def content_of(path):
    """What a file, or every file of a folder holds; None if there is nothing. Fails if it is not whole."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_text()
    assert sorted(each.name for each in path.iterdir()) == sorted(PARTS)
    (content,) = {(path / part).read_text() for part in PARTS}
    return content


def killed_at(number, action):
    """Runs `action` in a new process that gets SIGKILL when it is about to make its system call `number`.
    Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        left = [number]

        def profile(frame, event, argument):
            if event == "c_call" and getattr(argument, "__module__", "") in ("posix", "fcntl", "_io"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(profile)
        action()
        sys.setprofile(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def kills(action):
    """Yields after each kill of `action`: before its first system call, before the next, until it is done."""
    number = 1
    while killed_at(number, action):
        yield
        number += 1
    assert number > 20, "it was killed at all its system calls"


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_killed_at_any_moment_it_leaves_a_whole_copy_and_the_next_writer_cleans_up(write, tmp_path):
    path = tmp_path / "result"
    write(path, "old")
    for _ in kills(lambda: write(path, "new")):
        assert content_of(path) in ("old", "new")
        write(path, "old")
        assert [each.name for each in tmp_path.iterdir()] == ["result"] and content_of(path) == "old"


def test_a_file_system_without_an_exchange_gets_the_older_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda new, path: False)
    path, missing = tmp_path / "result", 0
    write_folder(path, "old")
    for _ in kills(lambda: write_folder(path, "new")):
        if content_of(path) is None:
            missing += 1
            remove_leftovers(tmp_path)
            assert content_of(path) == "old"
        write_folder(path, "old")
        assert [each.name for each in tmp_path.iterdir()] == ["result"]
    assert missing == 1


def test_a_reader_always_finds_the_folder_while_it_is_replaced(tmp_path):
    path, over, missing = tmp_path / "result", threading.Event(), []
    write_folder(path, "0")

    def look():
        while not over.is_set():
            if not (path / PARTS[0]).exists():
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(60):
        write_folder(path, str(number))
    over.set()
    reader.join()
    assert not missing


@contextlib.contextmanager
def another_process(path):
    """Another process that is in the middle of writing the folder `path`; it ends the work at the end."""
    (ready, is_ready), (go, goes) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with whole_folder(path) as made:
            made.mkdir()
            (made / PARTS[0]).write_text("theirs")
            os.write(is_ready, b"1")
            os.read(go, 1)
            (made / PARTS[1]).write_text("theirs")
        os._exit(0)
    try:
        assert os.read(ready, 1)
        yield child
        os.write(goes, b"1")
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for each in (ready, is_ready, go, goes):
            os.close(each)
    assert status == 0


def test_what_a_living_process_writes_is_not_touched(tmp_path):
    path = tmp_path / "result"
    with another_process(path):
        write_folder(path, "ours")
        remove_leftovers(tmp_path)
        assert content_of(path) == "ours"
    assert content_of(path) == "theirs"
    assert [each.name for each in tmp_path.iterdir()] == ["result"]


def test_leftovers_are_known_by_their_lock_not_by_a_process_number(tmp_path):
    """In a container, a new process often has the id of one that was killed."""
    left = tmp_path / f".result.partial-{os.getpid():08}"
    (left / "new" / "result").mkdir(parents=True)
    (left / "new" / "result" / "half").write_text("half")
    other = tmp_path / ".another.partial-abcdefg_"
    other.mkdir()
    write_folder(tmp_path / "result", "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == [other.name, "result"]
    remove_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["result"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    for name in (".result.partial-notes", ".result.partial-ABCDEFGH", ".result.partial-mynotes_"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    write_folder(tmp_path / "result", "new")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.glob(".result.partial-*/precious"))) == 3


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_where_a_link_leads_is_written(write, tmp_path):
    """The link stays, and a link to nothing gets what it leads to."""
    (tmp_path / "place").mkdir()
    write(tmp_path / "place" / "target", "old")
    for target in ("target", "nothing/yet"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("place") / target)
        write(link, "new")
        assert link.is_symlink() and content_of(tmp_path / "place" / target) == "new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "place"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "old", "new"])
@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("exchanges", [True, False])
def test_every_name_that_a_file_can_have_is_written(write, name, exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda new, path: False)
    for content in ("old", "new"):
        write(tmp_path / name, content)
        assert content_of(tmp_path / name) == content
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "text"), [("a\0b", "x"), ("\ud800", "x"), ("name", "\ud800")])
def test_a_name_or_text_that_no_file_can_have_is_one_line(name, text, tmp_path):
    with pytest.raises(UserError, match=r"^.* cannot be written \(.*\): (give|correct)[^\n]*$"):
        write_text(tmp_path / name, text)


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / ".result.partial-00000000").symlink_to(theirs)
    for guess in (".result.new.txt", ".result.txt.partial-11111111"):
        (folder / guess).symlink_to(theirs / "file")
    write_text(folder / "result.txt", "ours")
    write_folder(folder / "result", "ours")
    assert (theirs / "file").read_text() == "theirs"


@pytest.fixture
def full_disk():
    with small_disk(MOST):
        yield


def written_by(library, path):
    match library:
        case "python":
            path.write_text("x" * 2 * MOST)
        case "numpy":
            np.save(path, np.zeros(MOST))
        case "safetensors":
            save_file({"a": np.zeros(MOST)}, path)


@pytest.mark.parametrize("library", ["python", "numpy", "safetensors"])
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_disk_that_refuses_is_one_line_and_the_old_content_stays(library, whole, full_disk, tmp_path):
    path = tmp_path / "result"
    write_folder(path, "old") if whole is whole_folder else write_file(path, "old")
    with pytest.raises(UserError) as told, whole(path, 8 * MOST) as made:
        if whole is whole_folder:
            made.mkdir()
            made /= "file.npy"
        written_by(library, made)
    message = str(told.value)
    assert message.startswith(f"{path} cannot be written (") and "\n" not in message
    assert "512 KiB are needed" in message and "are free there" in message and "partial" not in message
    assert [each.name for each in tmp_path.iterdir()] == ["result"] and content_of(path) == "old"


def test_an_error_inside_a_new_folder_names_its_final_place(full_disk, tmp_path):
    with pytest.raises(UserError) as told, whole_folder(tmp_path / "result") as made:
        write_text(made / "file.txt", "x" * 2 * MOST)
    assert str(told.value).startswith(
        f"{tmp_path / 'result' / 'file.txt'} cannot be written (File too large)"
    )


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "result"):
        Path(tmp_path / "missing").read_text()
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["a file/result", "a folder", "x" * 300])
def test_a_place_where_no_file_can_be_is_named(place, tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(.*\): give another place") as told:
        write_text(tmp_path / place, "text")
    assert str(tmp_path / place) in str(told.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a file", "a folder"]

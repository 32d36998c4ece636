"""Working folders: nothing of anybody else is ever emptied, and a kill at any step leaves what the next run ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mediator_peft import MediatorConfig, build_mediator, plan_mediator
from mediator_peft.checkpoints import output_folder
from mediator_peft.checkpoints.output_folder import new_folder, partial_name, resumable_folder
from mediator_peft.checkpoints.replacing import finish_replacing, replaced_file, write_replacing
from mediator_peft.errors import OutputError, OutputExistsError
from tests.merge.helpers import digests, experts_of
from tests.tiny import write_tiny_checkpoints


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tiny_checkpoints(tmp_path_factory.mktemp("in"))


def build(paths, output, **options):
    return build_mediator(paths["base"], experts_of(paths), output, MediatorConfig(density=0.2), **options)


def precious(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


def link_to_a_folder(tmp_path):
    partial_name(tmp_path / "out").symlink_to(precious(tmp_path / "precious"))


def link_to_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    partial_name(tmp_path / "out").symlink_to(tmp_path / "empty")


def link_to_nothing(tmp_path):
    partial_name(tmp_path / "out").symlink_to(tmp_path / "nowhere")


def a_folder_of_files(tmp_path):
    precious(partial_name(tmp_path / "out"))


def a_file(tmp_path):
    partial_name(tmp_path / "out").write_text("years of work")


def a_pipe(tmp_path):
    os.mkfifo(partial_name(tmp_path / "out"))


def a_foreign_journal(tmp_path):
    precious(partial_name(tmp_path / "out") / ".journal")


def a_linked_journal(tmp_path):
    partial_name(tmp_path / "out").mkdir()
    (partial_name(tmp_path / "out") / ".journal").symlink_to(precious(tmp_path / "precious"))


def a_journal_linked_to_a_marked_one(tmp_path):
    """The marker is there, but behind a link."""
    (precious(tmp_path / "precious") / output_folder.MARKER).touch()
    partial_name(tmp_path / "out").mkdir()
    (partial_name(tmp_path / "out") / ".journal").symlink_to(tmp_path / "precious")


def a_foreign_journal_beside(tmp_path):
    precious(tmp_path / ".out.journal")


def a_linked_journal_beside(tmp_path):
    (tmp_path / ".out.journal").symlink_to(precious(tmp_path / "precious"))


def a_journal_beside_of_another_folder(tmp_path):
    """Left by a build that ended; the folder of files that took its place is not its own."""
    (tmp_path / ".out.journal").mkdir()
    (tmp_path / ".out.journal" / output_folder.MARKER).touch()
    (tmp_path / ".out.journal" / "folder").write_text("1 2")
    precious(partial_name(tmp_path / "out"))


IN_THE_WAY = [
    link_to_a_folder, link_to_an_empty_folder, link_to_nothing, a_folder_of_files, a_file, a_pipe, a_foreign_journal,
    a_linked_journal, a_journal_linked_to_a_marked_one, a_foreign_journal_beside, a_linked_journal_beside,
    a_journal_beside_of_another_folder,
]  # fmt: skip


def tree(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("put", IN_THE_WAY, ids=lambda put: put.__name__)
def test_what_is_not_ours_is_refused_and_left_alone(put, paths, tmp_path, monkeypatch):
    put(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr("mediator_peft.merge.offline.open_job", lambda *_, **__: pytest.fail("work was started"))
    with pytest.raises(OutputExistsError, match="no build made it"):
        build(paths, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="no build made it"), resumable_folder(tmp_path / "out", "key"):
        pytest.fail("the folder was given out")
    planned = plan_mediator(paths["base"], experts_of(paths), tmp_path / "out", MediatorConfig())
    assert any("no build made it" in problem for problem in planned.problems)
    assert tree(tmp_path) == before


def test_a_new_folder_does_not_take_what_is_there(tmp_path):
    (tmp_path / f".out.partial-{os.getpid()}").symlink_to(precious(tmp_path / "precious"))
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match="in the way"), new_folder(tmp_path / "out"):
        pytest.fail("the folder was given out")
    assert tree(tmp_path) == before


# What Python announces of the changes that a build makes to its folder.
_CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.posix_fallocate", "os.truncate", "os.chmod")


def killed_at(number: int, paths: dict[str, Path], out: Path) -> bool:
    """Build in a child that dies right before its change number so and so, or half through it; whether it died."""
    child = os.fork()
    if not child:
        seen = 0

        def is_last():
            nonlocal seen
            seen += 1
            return seen == number

        def hook(event, arguments):
            if event not in _CHANGES or ".out" not in str(arguments[0]):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            if is_last():
                os._exit(9)

        write_text, pwritev = Path.write_text, os.pwritev

        def write_half_a_text(path, text, *arguments, **options):
            if is_last():
                write_text(path, text[: len(text) // 2])
                os._exit(9)
            return write_text(path, text, *arguments, **options)

        def write_half_of_the_bytes(descriptor, buffers, offset):
            if is_last():
                pwritev(descriptor, [buffers[0][: len(buffers[0]) // 2]], offset)
                os._exit(9)
            return pwritev(descriptor, buffers, offset)

        try:
            sys.addaudithook(hook)
            Path.write_text, os.pwritev = write_half_a_text, write_half_of_the_bytes
            build(paths, out)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


def reported(out):
    """All of the report but where, how long and how much memory."""
    content = json.loads((out / "mediator" / "report" / "report.json").read_text())
    return {key: value for key, value in content.items() if key not in ("output", "seconds", "peak_memory_bytes")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.release)])
def test_a_build_killed_before_any_change_ends_with_the_same_bytes(stride, paths, tmp_path):
    build(paths, tmp_path / "whole")
    expected = digests(tmp_path / "whole"), reported(tmp_path / "whole")
    number = 1
    while True:
        out = tmp_path / str(number) / "out"
        was_killed = killed_at(number, paths, out)
        if not out.exists():
            build(paths, out)
        assert (digests(out), reported(out)) == expected, f"after a kill before change {number}"
        # Of a build that was whole already, an empty journal may be left.
        assert {path.name for path in out.parent.iterdir()} <= {"out", ".out.journal"}
        if not was_killed:
            break
        number += stride
    assert number > 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
@pytest.mark.parametrize("step", ["clear", "remove"])
def test_clearing_that_is_killed_anywhere_leaves_what_is_known_as_ours(step, tmp_path):
    for number in range(1, 12):
        out = tmp_path / str(number) / "out"
        child = os.fork()
        if not child:
            seen = 0

            def hook(event, arguments, number=number):
                nonlocal seen
                if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir") and ".out" in str(arguments[0]):
                    seen += step == "clear" or event in ("os.remove", "os.rmdir")
                    if seen == number:
                        os._exit(9)

            try:
                with pytest.raises(KeyboardInterrupt), resumable_folder(out, "first") as folder:
                    (folder / "a").write_text("a")
                    (folder / "b").mkdir()
                    (folder / "b" / "c").write_text("c")
                    (folder / ".journal" / "piece").write_text("p")
                    raise KeyboardInterrupt
                sys.addaudithook(hook)
                with resumable_folder(out, "second" if step == "clear" else "first"):
                    if step == "remove":
                        raise ValueError
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if not out.exists():
            with resumable_folder(out, "third") as folder:
                assert {path.name for path in folder.iterdir()} == {".journal"}
                (folder / "z").write_text("z")
            assert tree(out) == {"z": b"z"}


def test_the_loser_of_two_builds_is_told_so(paths, tmp_path, monkeypatch):
    """The winner ends while the other one waits for its lock."""
    out = tmp_path / "out"
    real, calls = output_folder._try_lock, []

    def try_lock(descriptor):
        if not calls:
            calls.append(1)
            # Between the opening of the folder and its locking, the other build ended.
            (partial_name(out) / "weights").touch()
            partial_name(out).rename(out)
        return real(descriptor)

    monkeypatch.setattr(output_folder, "_try_lock", try_lock)
    with pytest.raises(OutputExistsError, match="exists"):
        build(paths, out)
    assert tree(tmp_path) == {"out": None, "out/weights": b""}


def test_a_folder_whose_build_failed_is_made_again_by_the_one_that_waited(paths, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, calls = output_folder._try_lock, []

    def try_lock(descriptor):
        if not calls:
            calls.append(1)
            partial_name(out).rmdir()
        return real(descriptor)

    monkeypatch.setattr(output_folder, "_try_lock", try_lock)
    build(paths, out)
    assert out.is_dir()
    assert not partial_name(out).exists()


def test_a_link_in_the_place_of_a_decided_save_moves_nothing(tmp_path):
    kept, folder = precious(tmp_path / "precious"), tmp_path / "out"
    folder.mkdir()
    (folder / ".mediator-saved").symlink_to(kept)
    with pytest.raises(OutputError, match="is a link"):
        finish_replacing(folder)
    assert [path.name for path in kept.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_replaced_file_is_no_longer_what_it_was_linked_to(tmp_path, link):
    kept = precious(tmp_path / "precious") / "thesis.txt"
    for name in ("new.json", ".new.json.new"):
        getattr(tmp_path / name, link)(kept)
    write_replacing(tmp_path / "new.json", "{}")
    assert (tmp_path / "new.json").read_text() == "{}"
    assert kept.read_text() == "years of work"


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced_file(path) as new:
        new.write_text("half of")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_what_a_killed_writer_left_is_cleared_away_and_that_of_a_running_one_stays(tmp_path):
    path = tmp_path / "plan [1].json"
    left = tmp_path / f".{path.name}.{'0' * 16}.new"
    left.write_text("half of")
    (tmp_path / ".other.new").write_text("of somebody else")
    with replaced_file(path) as running:
        write_replacing(path, "second")
        assert running.exists()
        running.write_text("first")
    assert path.read_text() == "first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.new", path.name]


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_not_replaced_by_a_file(tmp_path, link):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "pipe"
    if link:
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(OSError, match="no file is in its place"):
        write_replacing(path, "{}")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1 + link

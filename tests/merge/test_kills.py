"""A build that is killed, again and again, at moments nobody chose."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from mediator_peft.checkpoints.output_folder import partial_name
from mediator_peft.kernels import dispatch
from mediator_peft.merge import journal as pieces
from mediator_peft.merge import offline
from tests.merge.helpers import EXPERTS, build, digests
from tests.tiny import write_tiny_checkpoints

NUM_KILLS = 20


def build_in_a_child(paths, out, workers):
    """A child process that builds, somewhat slowed down; its id."""
    child = os.fork()
    if child:
        return child
    put = pieces.JournalStore.put

    def slow(*arguments):
        time.sleep(0.004)
        put(*arguments)

    try:
        pieces.JournalStore.put = slow
        build(paths, out, workers=workers)
    finally:
        os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_at_random_points(workers, tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", ("base", *EXPERTS))
    dispatch.native()
    started = time.perf_counter()
    os.waitpid(build_in_a_child(paths, tmp_path / "whole", workers), 0)
    duration = time.perf_counter() - started
    expected = digests(tmp_path / "whole")
    moments, num_kills, num_whole, place = random.Random(workers), 0, 0, 0
    while num_kills < NUM_KILLS or not num_whole:
        out = tmp_path / f"out{place}"
        child = build_in_a_child(paths, out, workers)
        # Half of the kills fall anywhere in the run, half within what is left of one that was killed before.
        time.sleep(moments.uniform(0, duration) * moments.choice((1.0, 0.3)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():
            num_kills += 1
            continue
        # Done before the kill, or at the very moment: whole in either case.
        assert digests(out) == expected
        assert not partial_name(out).exists()
        num_whole, place = num_whole + 1, place + 1
    out = tmp_path / f"out{place}"
    build(paths, out, workers=workers)
    assert digests(out) == expected


def test_a_report_begun_by_a_killed_run_leaves_no_trace(tmp_path, monkeypatch):
    paths = write_tiny_checkpoints(tmp_path / "in", ("base", *EXPERTS))
    build(paths, tmp_path / "whole")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_checksums", killed)
        with pytest.raises(KeyboardInterrupt):
            build(paths, tmp_path / "out")
    assert (partial_name(tmp_path / "out") / "mediator" / "report" / "report.json").is_file()
    build(paths, tmp_path / "out")
    listed = [
        json.loads((tmp_path / name / "mediator" / "report" / "report.json").read_text())["files"]
        for name in ("whole", "out")
    ]
    assert listed[0] == listed[1]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

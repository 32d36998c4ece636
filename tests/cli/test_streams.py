"""Standard streams that are closed, full, or not UTF-8; imports that print nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from program import CLOSED
from tiny import write_tiny_checkpoints
from typer.testing import CliRunner

from mediator_peft.cli.app import app
from mediator_peft.optional import quiet_missing_kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_tiny_checkpoints(folder, ["base", "math"])
    command = ["build", "--base", folder / "base", "--expert", f"math={folder / 'math'}", "--output", folder / "büilt"]
    assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    return folder


# How a command is started: arguments of :meth:`Program.run`, exit codes it may end with.
STREAMS = {
    "": ({}, {0}),
    ">&-": ({"stdout": CLOSED}, {0}),
    "2>&-": ({"stderr": CLOSED}, {0}),
    "<&- >&- 2>&-": ({"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}, {0}),
    ">/dev/full": ({"stdout": "/dev/full"}, {4}),
    "| true": ({"stdout": "pipe"}, {1}),
}


@pytest.mark.parametrize("redirection", STREAMS)
@pytest.mark.parametrize("more", ["", "--json"])
def test_any_stream_may_be_closed_or_full(redirection, more, folder, program):
    settings, codes = STREAMS[redirection]
    arguments = ["inspect", folder / "büilt", *more.split()]
    with ExitStack() as stack:
        if settings.get("stdout") == "/dev/full":
            settings = {"stdout": stack.enter_context(open("/dev/full", "wb"))}
        elif settings.get("stdout") == "pipe":
            # Whoever reads it is gone before anything is written.
            reader, writer = os.pipe()
            os.close(reader)
            settings = {"stdout": stack.enter_context(os.fdopen(writer, "wb"))}
        found = program.run(*arguments, **settings)
    assert found.returncode in codes, found.stderr.decode()
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"], [], ["methods"]], ids=" ".join)
def test_help_and_version_are_refused_by_a_full_disk_with_a_message(arguments, program):
    with open("/dev/full", "wb") as full:
        found = program.run(*arguments, stdout=full)
    assert found.returncode == 4, found.stderr.decode()
    assert found.stderr.startswith(b"error: ")
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


@pytest.mark.parametrize(("redirection", "code"), [(">/dev/full", 4), ("<&- >&- 2>&-", 0), ("| head -c 1", 0)])
def test_so_it_is_in_a_process_that_python_started(redirection, code, folder):
    """The others are forks, whose streams the test sets up."""
    command = f"{sys.executable} -m mediator_peft inspect '{folder / 'büilt'}' --json {redirection}"
    found = subprocess.run(command, shell=True, capture_output=True, check=False, timeout=120)
    assert found.returncode == code, found.stderr.decode()
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


def test_nothing_is_written_into_a_file_that_took_the_place_of_a_closed_stream(folder, program):
    arguments = ["build", "--base", folder / "base", "--expert", f"math={folder / 'math'}"]
    found = program.run(*arguments, "--output", folder / "again", stdin=CLOSED, stdout=CLOSED, stderr=CLOSED)
    assert found.returncode == 0
    first, second = ((folder / name / "model.safetensors").read_bytes() for name in ("büilt", "again"))
    assert first == second


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_need_not_be_utf8(encoding, folder, program):
    environment = {"PYTHONIOENCODING": encoding}
    as_json = program.run("inspect", folder / "büilt", "--json", environment=environment)
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout.decode(encoding))["adapter"].endswith("büilt/mediator")
    table = program.run("inspect", folder / "büilt", environment=environment)
    assert table.returncode == 0, table.stderr
    missing = program.run("inspect", "nöwhere", environment=environment)
    assert missing.returncode == 3
    assert b"Traceback" not in missing.stderr


def test_importing_prints_nothing(program):
    program.run("--version")
    assert program.said_at_start == ""


def test_other_warnings_of_bitsandbytes_are_heard(caplog):
    quiet_missing_kernel()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "reasons")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    with caplog.at_level(logging.INFO, logger.name):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "reasons")
    assert caplog.records[-1].levelname == "INFO"

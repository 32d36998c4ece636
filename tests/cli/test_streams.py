"""Standard streams that are closed, full, or not UTF-8; imports that print nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
from tiny import write_tiny_checkpoints
from typer.testing import CliRunner

from mediator_peft.cli.app import app
from mediator_peft.optional import quiet_missing_kernel

PROGRAM = f"{sys.executable} -m mediator_peft"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_tiny_checkpoints(folder, ["base", "math"])
    command = ["build", "--base", folder / "base", "--expert", f"math={folder / 'math'}", "--output", folder / "büilt"]
    assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    return folder


def shell(command, **settings):
    return subprocess.run(command, shell=True, capture_output=True, check=False, timeout=120, **settings)


@pytest.mark.parametrize(
    ("redirection", "codes"),
    [
        ("", {0}),
        (">&-", {0}),
        ("2>&-", {0}),
        ("<&- >&- 2>&-", {0}),
        (">/dev/full", {4}),
        ("| head -c 1", {0}),
    ],
)
@pytest.mark.parametrize("more", ["", "--json"])
def test_any_stream_may_be_closed_or_full(redirection, codes, more, folder):
    found = shell(f"{PROGRAM} inspect '{folder / 'büilt'}' {more} {redirection}")
    assert found.returncode in codes, found.stderr.decode()
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


def test_nothing_is_written_into_a_file_that_took_the_place_of_a_closed_stream(folder):
    found = shell(
        f"{PROGRAM} build --base {folder / 'base'} --expert math={folder / 'math'} --output {folder / 'again'} "
        "<&- >&- 2>&-"
    )
    assert found.returncode == 0
    first, second = ((folder / name / "model.safetensors").read_bytes() for name in ("büilt", "again"))
    assert first == second


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_need_not_be_utf8(encoding, folder):
    environment = {**dict(os.environ), "PYTHONIOENCODING": encoding}
    as_json = shell(f"{PROGRAM} inspect '{folder / 'büilt'}' --json", env=environment)
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout.decode(encoding))["adapter"].endswith("büilt/mediator")
    table = shell(f"{PROGRAM} inspect '{folder / 'büilt'}'", env=environment)
    assert table.returncode == 0, table.stderr
    missing = shell(f"{PROGRAM} inspect 'nöwhere'", env=environment)
    assert missing.returncode == 3
    assert b"Traceback" not in missing.stderr


def test_importing_prints_nothing():
    code = "import mediator_peft, peft\nfrom mediator_peft import load_mediator"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout + found.stderr == ""


def test_other_warnings_of_bitsandbytes_are_heard(caplog):
    quiet_missing_kernel()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "reasons")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    with caplog.at_level(logging.INFO, logger.name):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "reasons")
    assert caplog.records[-1].levelname == "INFO"

"""The C++ sources beyond what this processor runs: under sanitizers, and for 64-bit ARM."""

import subprocess
from pathlib import Path

import pytest

SKIPPED = 77


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("sanitize.sh", marks=pytest.mark.release),
        pytest.param("aarch64.sh", marks=pytest.mark.slow),
    ],
)
def test_the_self_test_passes(script):
    command = ["bash", str(Path(__file__).with_name(script)), "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all right")

"""Kills a build at random moments, again and again, and compares what the last run leaves with an undisturbed build.

    python tests/benchmarks/kill_build.py --base BASE --expert A --expert B --kills 20

Each kill is a SIGKILL to the whole build, at a moment drawn from the time a build takes. Whatever was finished stays
for the next run. A run that is done before its kill must have the bytes of the undisturbed build, and the next one
begins anew; while a build is unfinished, nothing may stand under the final name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from bench_build import build_command

# What tells the time or names the output's folder.
_VOLATILE = ("output", "seconds", "peak_memory_bytes")


def digests(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file; the report without what differs from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                data = json.dumps({key: value for key, value in report.items() if key not in _VOLATILE}).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A build in a session of its own, so that a kill reaches its workers, too."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", action="append", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; must have room for two outputs")
    options = parser.parse_args()
    options.max_memory = None
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        whole, out = Path(name) / "whole", Path(name) / "out"
        started = time.perf_counter()
        if start(build_command(options.base, options.expert, whole, options)).wait():
            raise SystemExit("the undisturbed build failed")
        duration, expected = time.perf_counter() - started, digests(whole)
        command = build_command(options.base, options.expert, out, options)
        num_kills = num_whole = 0
        while num_kills < options.kills or not num_whole:
            build = start(command)
            # Half of the kills fall anywhere in the run, half in its first third.
            limit = duration * moments.choice((1.0, 0.35)) if num_kills < options.kills else 600.0
            try:
                code = build.wait(moments.uniform(0, limit) if num_kills < options.kills else limit)
            except subprocess.TimeoutExpired:
                os.killpg(build.pid, signal.SIGKILL)
                build.wait()
                num_kills += 1
                code = None
            if code:
                raise SystemExit(f"a resumed build failed with exit code {code}, after {num_kills} kills")
            if out.exists():
                found = digests(out)
                if found != expected:
                    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                    raise SystemExit(f"after {num_kills} kills these differ: {', '.join(names)}")
                num_whole += 1
                shutil.rmtree(out)
            print(f"  kills {num_kills}, whole outputs {num_whole}", flush=True)
        print(f"{num_kills} kills; {num_whole} outputs came to their end, all with the bytes of the undisturbed build")


if __name__ == "__main__":
    main()

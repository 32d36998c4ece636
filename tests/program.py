"""The program in processes of its own that need not import anything.

Starting Python and importing torch and transformers takes seconds of a processor, and tests of the command line would
do so many times. Instead pytest's process imports what the program needs, since tests need most of it too, and forks a
server before any test is collected; the server forks for each process that a test wants. A fork has the arguments,
environment, folder and standard streams that the test gives it. It sets up ``sys.stdin``, ``sys.stdout`` and
``sys.stderr`` as Python does when it starts, and at the end writes their buffers as Python does, and says on the error
stream what fails then.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import torch

CLOSED = "closed"
"""In the place of a stream: none."""

SECONDS = 300
"""After so many without an answer, all processes are ended."""

PRELOADED = (
    "mediator_peft",
    "bitsandbytes",
    "peft",
    "mediator_peft.__main__",
    "mediator_peft.cli.app",
    "mediator_peft.evaluation.runner",
    "mediator_peft.evaluation.report",
    "mediator_peft.tuner.loading",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "torch.distributed",
    "matplotlib.figure",
)


OPTIONAL = ("bitsandbytes", "matplotlib.figure")
"""Of these, what a machine may lack."""


class Finished(NamedTuple):
    """How a process ended: its exit code (negative: the signal that ended it), and what it wrote."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Program:
    """Starts processes of the program, or of some code; needs ``fork``."""

    def __init__(self) -> None:
        self.said_at_start = _prepare()
        """What was written when the package and PEFT were imported."""
        self._socket, theirs = socket.socketpair()
        self._server = os.fork()
        if not self._server:
            self._socket.close()
            _serve(theirs)
        theirs.close()
        self._socket.settimeout(SECONDS)

    def close(self) -> None:
        """End the server."""
        self._socket.close()
        os.waitpid(self._server, 0)

    def run(self, *arguments: object, **settings: Any) -> Finished:
        """``mediator-peft`` with these arguments; settings as in :meth:`start`."""
        return self.start([list(map(str, arguments))], **settings)[0]

    def run_ranks(self, count: int, *arguments: object, **settings: Any) -> list[Finished]:
        """The same on some ranks, with the environment that torchrun gives them."""
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": random.randint(20000, 40000)}
        own = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        return self.start([list(map(str, arguments))] * count, own, **settings)

    def run_code(self, code: str, *arguments: object, **settings: Any) -> Finished:
        """As ``python -c code arguments``."""
        return self.start([list(map(str, arguments))], code=code, **settings)[0]

    def start(
        self,
        arguments: Sequence[Sequence[str]],
        own: Sequence[Mapping[str, object]] = (),
        environment: Mapping[str, object] | None = None,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        code: str | None = None,
    ) -> list[Finished]:
        """Run processes side by side, and wait for their end.

        Args:
            arguments: of each process.
            own: further variables of the environment of each.
            environment: further ones of all.
            stdin: ``DEVNULL``, an open file, or ``CLOSED``.
            stdout: ``PIPE`` for what is returned, an open file, or ``CLOSED``.
            stderr: likewise.
            code: to run in the place of the program.
        """
        orders, files = [], []
        with ExitStack() as stack:
            outputs = []
            for number, each in enumerate(arguments):
                streams, written = [], []
                for wanted in (stdin, stdout, stderr):
                    file = wanted
                    if wanted == subprocess.PIPE:
                        file = stack.enter_context(tempfile.TemporaryFile())
                        written.append(file)
                    elif wanted == subprocess.DEVNULL:
                        file = stack.enter_context(open(os.devnull, "rb"))
                    elif wanted == CLOSED:
                        streams.append(None)
                        continue
                    streams.append(len(files))
                    files.append(file.fileno() if hasattr(file, "fileno") else file)
                outputs.append([written.pop(0) if kind == subprocess.PIPE else None for kind in (stdout, stderr)])
                variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
                variables |= own[number] if own else {}
                orders.append({
                    "arguments": each, "streams": streams, "code": code, "folder": os.getcwd(),
                    "environment": {key: str(value) for key, value in variables.items()},
                })  # fmt: skip
            socket.send_fds(self._socket, [_framed(orders)], files)
            try:
                codes = json.loads(_received(self._socket))
            except TimeoutError:
                os.killpg(self._server, signal.SIGKILL)
                raise
            found = []
            for returncode, pair in zip(codes, outputs, strict=True):
                texts = []
                for file in pair:
                    if file is not None:
                        file.seek(0)
                    texts.append(b"" if file is None else file.read())
                found.append(Finished(returncode, *texts))
            return found


def _framed(what: Any) -> bytes:
    text = json.dumps(what).encode()
    return len(text).to_bytes(8, "little") + text


def _received(channel: socket.socket, start: bytes = b"") -> bytes:
    """The rest of one message."""
    while len(start) < 8 or len(start) < 8 + int.from_bytes(start[:8], "little"):
        more = channel.recv(1 << 16)
        if not more:
            raise EOFError
        start += more
    return start[8:]


def _serve(channel: socket.socket) -> NoReturn:
    """Fork for each order until the tests end."""
    os.setsid()
    gc.enable()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        start, files, _, _ = socket.recv_fds(channel, 1 << 16, 64)
        if not start:
            os._exit(0)
        orders = json.loads(_received(channel, start))
        children = []
        for order in orders:
            child = os.fork()
            if not child:
                channel.close()
                _become(order, files)
                _run(order["code"])
            children.append(child)
        for file in files:
            os.close(file)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        channel.sendall(_framed(codes))


def _prepare() -> str:
    """Import what processes of the program import; returns what that wrote."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        streams = sys.stdout, sys.stderr
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout, sys.stderr = _opened(1, "w", "utf-8", "strict"), _opened(2, "w", "utf-8", "backslashreplace")
        try:
            for name in PRELOADED:
                with ExitStack() as stack:
                    if name in OPTIONAL:
                        stack.enter_context(suppress(ImportError))
                    if name == "bitsandbytes":
                        # It compiles its optimizers where it can: a second or more for what no test calls.
                        stack.enter_context(mock.patch.object(torch, "compile", side_effect=RuntimeError("not here")))
                    import_module(name)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        log.seek(0)
        return log.read().decode()


def _become(order: dict[str, Any], files: Sequence[int]) -> None:
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, place in enumerate(order["streams"]):
        if place is None:
            os.close(number)
        else:
            os.dup2(files[place], number)
    for file in files:
        os.close(file)
    _open_streams()
    sys.argv = ["mediator-peft", *order["arguments"]]


def _open_streams() -> None:
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdin = sys.__stdin__ = _opened(0, "r", encoding, errors or "strict")
    sys.stdout = sys.__stdout__ = _opened(1, "w", encoding, errors or "strict")
    sys.stderr = sys.__stderr__ = _opened(2, "w", encoding, "backslashreplace")


def _opened(number: int, mode: str, encoding: str, errors: str) -> Any:
    """A standard stream, as Python opens it; None where it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    plain = open(number, f"{mode}b", closefd=False)  # noqa: SIM115 - it stays open to the end
    return io.TextIOWrapper(plain, encoding, errors, line_buffering=number == 2)


def _run(code: str | None) -> NoReturn:
    """What Python does with a main module, to the end of the process."""
    try:
        if code is None:
            import_module("mediator_peft.__main__").main()
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status: Any = 0
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as fault:
        status = 120
        with suppress(Exception):
            print(f"Exception ignored in: {sys.stdout!r}\n{fault!r}", file=sys.stderr)
    with suppress(Exception):
        sys.stderr.flush()
    os._exit(status or 0)

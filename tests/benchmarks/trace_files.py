"""Lists the files of the package that run for one tensor of a build and for one mixed forward pass.

    PYTHONPATH=. python tests/benchmarks/trace_files.py [--functions]

Counted are files of which a Python function is called; methods are those of a default build. Values that functions keep
(``functools.cache``) are found without a call.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import mediator_peft
from mediator_peft import MediatorConfig, build_mediator, load_mediator
from tests.tiny import fine_tuned, tiny_model

PACKAGE = str(Path(mediator_peft.__file__).parent) + "/"


def trace(action, inside=None):
    """Functions that run during ``action``, per file of the package, in the order of their first call.

    Args:
        action: called without arguments.
        inside: ``(file, function)``; only this function and what it calls are listed.

    Returns:
        (result of ``action``, {file: {function: calls}}).
    """
    seen, depth = {}, 0

    def profile(frame, event, arg):
        nonlocal depth
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or event not in ("call", "return"):
            return
        file = code.co_filename.removeprefix(PACKAGE)
        if inside == (file, code.co_name):
            depth += 1 if event == "call" else -1
        elif inside and not depth:
            return
        if event == "call":
            calls = seen.setdefault(file, {})
            name = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
            calls[name] = calls.get(name, 0) + 1

    sys.setprofile(profile)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return result, seen


def show(title, seen, with_functions):
    print(f"{title}: {len(seen)} files, {sum(sum(calls.values()) for calls in seen.values())} calls")
    for file, calls in seen.items():
        names = ", ".join(f"{name} ({count})" for name, count in calls.items())
        print(f"  {file}: {names}" if with_functions else f"  {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", action="store_true", help="name the functions of each file, with their calls")
    with_functions = parser.parse_args().functions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny_model()
        base.save_pretrained(folder / "base")
        experts = {expert: folder / expert for expert in "ab"}
        for seed, path in enumerate(experts.values()):
            fine_tuned(base, seed).save_pretrained(path)
        _, seen = trace(
            lambda: build_mediator(folder / "base", experts, folder / "mediator", MediatorConfig()),
            inside=("merge/tensor_work.py", "__call__"),
        )
        show("one tensor of a build", seen, with_functions)
        model, _ = load_mediator(folder / "mediator")
        ids = torch.arange(1, 9).reshape(1, 8)
        _, seen = trace(lambda: model(input_ids=ids, expert_weights=dict.fromkeys(experts, 0.5)))
        show("one mixed forward pass", seen, with_functions)


if __name__ == "__main__":
    main()

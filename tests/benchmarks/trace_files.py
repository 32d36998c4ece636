"""Lists the files of the package that run for one tensor of a build and for one mixed forward pass."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from tests.tiny import fine_tuned, tiny_model

PACKAGE = "mediator_peft/"


def trace(action, inside=None):
    """Functions that run during ``action``, per file of the package, in the order of their first call.

    Args:
        action: called without arguments.
        inside: ``(file, function)``; only what this function calls is listed, with the function itself.

    Returns:
        (result of ``action``, {file: {function: calls}}).
    """
    seen, depth = {}, 0

    def profile(frame, event, arg):
        nonlocal depth
        code = frame.f_code
        if PACKAGE not in code.co_filename or event not in ("call", "return"):
            return
        file = code.co_filename.split(PACKAGE)[-1]
        if inside == (file, code.co_name):
            depth += 1 if event == "call" else -1
        elif inside and not depth:
            return
        if event == "call":
            calls = seen.setdefault(file, {})
            calls[code.co_qualname] = calls.get(code.co_qualname, 0) + 1

    sys.setprofile(profile)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return result, seen


def show(title, seen, functions):
    print(f"{title}: {len(seen)} files")
    for file, calls in seen.items():
        names = ", ".join(f"{name} ({count})" for name, count in calls.items())
        print(f"  {file}" + (f": {names}" if functions else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", action="store_true", help="name the functions of each file and their calls")
    functions = parser.parse_args().functions
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
        show("one tensor of a build", seen, functions)
        model, _ = load_mediator(folder / "mediator")
        ids = torch.arange(1, 9).reshape(1, 8)
        _, seen = trace(lambda: model(input_ids=ids, expert_weights=dict.fromkeys(experts, 0.5)))
        show("one mixed forward pass", seen, functions)


if __name__ == "__main__":
    main()

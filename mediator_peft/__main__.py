"""``python -m mediator_peft``: the command line; under torchrun, ranks share tensors and prompts out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout


def main() -> None:
    """Run the command, on this rank or alone."""
    run = _import_command()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        run()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        if dist.get_rank() == 0:
            run()
        else:  # one rank speaks for all
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                sys.stderr = nowhere
                run()
    finally:
        sys.stderr = sys.__stderr__
        dist.destroy_process_group()


def _import_command() -> Callable[[], None]:
    # Modules make a great many objects that stay: looking through them for garbage, again and again, would take longer
    # than some builds.
    gc.disable()
    from .cli.app import main as run

    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()
    return run


if __name__ == "__main__":
    main()

"""``python -m mediator_peft``: the command line; under torchrun, ``build`` shares its work out over the ranks."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout


def main() -> None:
    """Run the command, on this rank or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        from .cli import main as run

        run()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        from .cli import main as run

        if dist.get_rank() == 0:
            run()
        else:  # one rank speaks for all
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                sys.stderr = nowhere
                run()
    finally:
        sys.stderr = sys.__stderr__
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""``mediator-peft verify``: is an output whole, and how near are its experts to the originals?"""

from __future__ import annotations

from typing import Annotated

import typer

from .common import BAD_INPUT, AsJson, OutputFolder, console, parse_pairs, print_json, quiet_transformers, say


def verify(
    out: OutputFolder,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Compare an expert with its original; once for each.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Compare the fallback with the base, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check files, checksums and fingerprint of OUT; with --against also how far each expert's weights are off.

    Ends with 3 where something is damaged or missing. Differences are told, not judged: sparse deltas leave something
    out. At density 1 with values=float they are rounding alone.

    Example:
      mediator-peft verify out --against math=math --against cron=cron
    """
    from ..build.verify import verify_mediator

    quiet_transformers()
    found = verify_mediator(out, against=parse_pairs(against or [], "--against"), base=base)
    if as_json:
        print_json(found.to_dict())
    else:
        for problem in found.problems:
            say(f"problem: {problem}")
        if found.is_ok:
            console().print("files, checksums and fingerprint are in order")
        for name, difference in found.differences.items():
            console().print(
                f"{name}: largest weight difference {difference['max_difference']:.3g} in {difference['tensor']}, "
                f"relative error of all weights {difference['relative_error']:.3g}"
            )
    if not found.is_ok:
        raise typer.Exit(BAD_INPUT)

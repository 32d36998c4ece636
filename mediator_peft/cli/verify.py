"""``mediator-peft verify``: is an output whole, and how near are its experts to the originals?"""

from __future__ import annotations

from typing import Annotated

import typer

from .common import (
    BAD_INPUT,
    AsJson,
    OutputFolder,
    check_output,
    console,
    parse_pairs,
    print_json,
    quiet_transformers,
    reading_output,
    say,
)


def verify(
    out: OutputFolder,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Compare an expert with its checkpoint; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of LoRA experts given with --against.")] = None,
    logits: Annotated[
        bool, typer.Option(help="With --against: also compare logits. Holds both models in memory.")
    ] = True,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take the files as they are: write new checksums after an edit on purpose.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check files, checksums and fingerprint of OUT; with --against also compare weights and logits with experts.

    Ends with exit code 3 if something is damaged or missing. Differences from experts are reported and are no fault:
    sparse deltas are approximations. At density 1 with encoding=float only rounding differs.

    Example:
      mediator-peft verify out --against math=math --against cron=cron
    """
    from ..checkpoints.checksums import is_merged_model
    from ..merge.verify import accept_output, verify_mediator

    quiet_transformers()
    originals = parse_pairs(against or [], "--against")
    has_experts = not is_merged_model(out.expanduser())
    if has_experts:
        check_output(out)
    with reading_output(out):
        if accept:
            accept_output(out)
        found = verify_mediator(out, against=originals, base=base)
        if originals and logits and found.is_ok:
            from ..evaluation.logits import logit_differences

            for name, largest in logit_differences(out, originals, base).items():
                found.differences[name]["max_logit_difference"] = largest
    if as_json:
        print_json(found.to_dict())
    else:
        for problem in found.problems:
            say(f"problem: {problem}")
        if found.is_ok:
            console().print("files, checksums and fingerprint are in order" if has_experts else "files are in order")
        for name, difference in found.differences.items():
            place = f" in {difference['tensor']}" if difference["tensor"] else ""
            logit = difference.get("max_logit_difference")
            console().print(
                f"{name}: largest weight difference {difference['max_difference']:.3g}{place}, "
                f"relative error of all weights {difference['relative_error']:.3g}"
                + ("" if logit is None else f", largest logit difference {logit:.3g}")
            )
    if not found.is_ok:
        raise typer.Exit(BAD_INPUT)

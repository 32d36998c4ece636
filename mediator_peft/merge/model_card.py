"""The model card of an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..config import MediatorSettings
from .report import BuildReport

_USAGE = (
    "```python",
    "from mediator_peft import load_mediator",
    "",
    'model, tokenizer = load_mediator("path/to/this/folder")',
    "```",
)
"""Lines of every card that say how to load."""


def model_card(config: MediatorSettings, report: BuildReport | None, licence: str | None = None) -> str:
    """Markdown with a YAML header, as the hub expects.

    Args:
        config: a built configuration.
        report: of the build, where it is at hand.
        licence: what the header says of it, e.g. ``apache-2.0``.
    """
    provenance = config.provenance or {}
    experts = provenance.get("experts", {})
    lines = [
        *_header(config, "peft", licence),
        "# Mediator adapter",
        "",
        f"{len(config.expert_names or experts)} fine-tuned models of one base, merged into a dense backbone "
        f"(`merge_method={config.merge_method}`) and sparse experts in "
        f"{_num_routed_blocks(config.routed_modules or ())} of {config.num_blocks} blocks, mixed per prompt. The idea "
        "is that of *Mediator* (arXiv 2502.04411); formulas and figures are those of `mediator_peft`.",
        "",
        *_USAGE,
        "",
        "| | |",
        "|---|---|",
        f"| base | `{provenance.get('base', 'unknown')}` |",
        *(f"| expert `{name}` | `{source}` |" for name, source in experts.items()),
        f"| kept entries | {config.density:.0%} by `{config.sparsifier}`, stored as `{config.encoding}` |",
        f"| fallback for unknown prompts | {config.fallback} |",
    ]
    if report is not None:
        lines += [
            f"| routed blocks | {len(report.routed_blocks)} of {report.num_blocks} |",
            f"| bytes per routed parameter and delta, in memory | {report.bytes_per_parameter:.3f} |",
            *(
                f"| cosine of packed and whole delta, `{name}` | {error['cosine']:.3f} |"
                for name, error in report.delta_errors.items()
            ),
        ]
    return "\n".join([*lines, ""])


def output_card(config: MediatorSettings, licence: str | None = None) -> str:
    """The card of a whole output: of the backbone, with the adapter in its folder.

    Args:
        config: a built configuration.
        licence: what the header says of it, e.g. ``apache-2.0``.
    """
    experts = (config.provenance or {}).get("experts", {})
    lines = [
        *_header(config, "transformers", licence),
        "# Merged backbone with a Mediator adapter",
        "",
        f"The dense backbone of {len(config.expert_names or experts)} fine-tuned models of one base "
        f"(`merge_method={config.merge_method}`). The adapter with their sparse deltas is in `mediator/`.",
        "",
        *_USAGE,
        "",
        "`AutoModelForCausalLM.from_pretrained` on this folder gives the backbone alone.",
        "",
    ]
    return "\n".join(lines)


def merged_card(config: MediatorSettings, licence: str | None = None) -> str:
    """The card of a merged model without an adapter.

    Args:
        config: with the provenance of base and experts.
        licence: what the header says of it, e.g. ``apache-2.0``.
    """
    provenance = config.provenance or {}
    settings = "".join(f", `{name}={value}`" for name, value in sorted(config.merge_parameters.items()))
    lines = [
        *_header(config, "transformers", licence),
        "# Merged model",
        "",
        f"{len(config.experts)} fine-tuned models of one base, merged by `{config.merge_method}`{settings} with "
        "`mediator-peft merge`. Inputs and settings are in `provenance.json`.",
        "",
        "| | |",
        "|---|---|",
        f"| base | `{provenance.get('base', 'unknown')}` |",
        *(f"| expert `{name}` | `{source}` |" for name, source in (provenance.get("experts") or {}).items()),
        "",
    ]
    return "\n".join(lines)


def _header(config: MediatorSettings, library: str, licence: str | None) -> list[str]:
    """Metadata as the hub reads it; only hub ids are named there, for it knows no folders."""
    provenance = config.provenance or {}
    sources = [provenance.get("base"), *(provenance.get("experts") or {}).values()]
    ids = [_HUB_ID.fullmatch(str(source)) for source in sources if source and not Path(str(source)).exists()]
    named = dict.fromkeys(found["name"] for found in ids if found)
    return [
        "---",
        *(("base_model:", *(f"- {name}" for name in named)) if named else ()),
        *((f"license: {licence}",) if licence else ()),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [mediator_peft, merge, model-merging, sparse-experts]",
        "---",
        "",
    ]


# With a revision, as a build pins it.
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@\w[\w./-]*)?")


def _num_routed_blocks(layers: Iterable[str]) -> int:
    """Among names such as ``model.layers.3.mlp.up_proj``; what lies outside of the blocks has no number."""
    return len({next((part for part in name.split(".") if part.isdigit()), None) for name in layers} - {None})

"""The model card of an adapter."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import MediatorSettings
from .report import BuildReport


def model_card(config: MediatorSettings, report: BuildReport | None) -> str:
    """Markdown with a YAML header, as the hub expects.

    Args:
        config: a built configuration.
        report: of the build, where it is at hand.
    """
    provenance = config.provenance or {}
    experts = provenance.get("experts", {})
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [mediator_peft, model-merging, sparse-experts]",
        "---",
        "",
        "# Mediator adapter",
        "",
        f"{len(config.expert_names or experts)} fine-tuned models of one base, merged into a dense backbone "
        f"(`merge_method={config.merge_method}`) and sparse experts in "
        f"{_num_routed_blocks(config.routed_modules or ())} of {config.num_blocks} blocks, mixed per prompt. The idea "
        "is that of *Mediator* (arXiv 2502.04411); formulas and figures are those of `mediator_peft`.",
        "",
        "```python",
        "from mediator_peft import load_mediator",
        "",
        'model, tokenizer = load_mediator("path/to/this/folder")',
        "```",
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


def _num_routed_blocks(layers: Iterable[str]) -> int:
    """Among names such as ``model.layers.3.mlp.up_proj``; what lies outside of the blocks has no number."""
    return len({next((part for part in name.split(".") if part.isdigit()), None) for name in layers} - {None})

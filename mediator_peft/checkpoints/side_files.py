"""Files beside the weights: tokenizers, chat templates, licences. Differences are warnings, not errors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .headers import read_json

_TOKEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")
_CONFIG_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LISTED = 5


def compare_side_files(folders: Mapping[str, Path]) -> list[str]:
    """How experts differ from the base in what stands beside the weights.

    Args:
        folders: label → folder, the base (or what stands in for it) first.

    Returns:
        One message each; every one says which side the output takes.
    """
    if not folders:
        return []
    labels = list(folders)
    reference = folders[labels[0]]
    messages = []
    for label in labels[1:]:
        folder = folders[label]
        messages += _vocabulary(label, reference, folder)
        ours, theirs = chat_template(reference), chat_template(folder)
        if theirs is not None and ours != theirs:
            has = "another chat template than" if ours is not None else "a chat template, unlike"
            messages.append(f"{label} has {has} {labels[0]}; the output takes that of {labels[0]}")
        for name, keys in (("tokenizer_config.json", _TOKEN_KEYS), ("config.json", _CONFIG_KEYS)):
            messages += _settings(label, labels[0], name, keys, reference, folder)
    licences = {label: found for label, folder in folders.items() if (found := licence(folder))}
    if len(set(licences.values())) > 1:
        messages.append(
            "licences differ: "
            + ", ".join(f"{label}: {found}" for label, found in licences.items())
            + "; the output must satisfy all of them"
        )
    return messages


def _vocabulary(label: str, reference: Path, folder: Path) -> list[str]:
    ours, theirs = vocabulary(reference), vocabulary(folder)
    if ours is None or theirs is None or ours == theirs:
        return []
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    added, gone = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    parts = [
        f"{what} {', '.join(map(repr, tokens[:_LISTED]))}"
        + (f" and {len(tokens) - _LISTED} more" * (len(tokens) > _LISTED))
        for what, tokens in (("other ids for", moved), ("more tokens:", added), ("fewer tokens:", gone))
        if tokens
    ]
    return [f"{label} has another vocabulary ({'; '.join(parts)}); the output takes the base's tokenizer"]


def _settings(
    label: str, base_label: str, name: str, keys: tuple[str, ...], reference: Path, folder: Path
) -> list[str]:
    ours, theirs = read_json(reference / name), read_json(folder / name)
    return [
        f"{label} has {key} = {theirs[key]!r} in {name}, {base_label} has {ours[key]!r}; the output takes the latter"
        for key in keys
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token → id, from ``tokenizer.json``; None where there is none, or none of the known form."""
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return None
    entries = model.get("vocab")
    try:
        if isinstance(entries, list):  # Unigram: pairs of token and score, in the order of their ids
            found = {str(pair[0]): number for number, pair in enumerate(entries)}
        else:
            found = dict(entries or {})
        for token in tokenizer.get("added_tokens") or ():
            found[token["content"]] = token["id"]
    except (TypeError, KeyError, IndexError, ValueError):
        return None
    return found if all(isinstance(number, int) for number in found.values()) else None


def chat_template(folder: Path) -> str | None:
    """The chat template, wherever it is kept; None where there is none."""
    text = _read_text(folder / "chat_template.jinja")
    if text is not None:
        return text
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    return None


def licence(folder: Path) -> str | None:
    """The licence that the model card names in its header; None where it names none."""
    lines = (_read_text(folder / "README.md") or "").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("\"'") or None
    return None

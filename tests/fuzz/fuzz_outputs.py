"""Mutates the files of a small output and looks at what loading makes of it.

Every mutated output must give one of our errors, or the same logits and routes as the whole one. Run it as
``python tests/fuzz/fuzz_outputs.py --count 10000``; ``tests/fuzz/test_fuzz_outputs.py`` runs a few hundred.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file, save_file
from tiny import random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.checkpoints.checksums import CHECKSUM_FILE
from mediator_peft.errors import MediatorError

OUR_ERROR, SAME, OTHER, DIFFERENT = "our error", "same result", "other exception", "different result"

ODD_VALUES = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**64, 10**30, 0.5, -0.5, float("nan"), float("inf"), 1e308),
    *("", "x", "base", "../..", "\ud800", [], {}, [[]], [None], {"a": 1}, ["a", "a"]),
)


def make_output(folder: Path) -> Path:
    """A whole output with tokenizer, chat template, two shards' worth of settings and a fitted router."""
    paths = write_tiny_checkpoints(folder / "in")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(paths["base"])
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(density=0.3))
    model, tokenizer = load_mediator(folder / "out")
    topics = {"math": topic_texts(5, 45, 40, seed=1), "code": topic_texts(50, 90, 40, seed=2)}
    model.fit_router(topics, tokenizer)
    model.save_pretrained(folder / "out" / "mediator")
    return folder / "out"


def result(out: Path, verify_files: bool = True, renders: bool = True) -> tuple[object, ...]:
    """All that an output says of a few prompts, with ``renders`` those of a chat among them."""
    model, tokenizer = load_mediator(out, verify_files=verify_files)
    prompts = random_prompts(2)
    with torch.no_grad():
        route = model.route(prompts)
        logits = [model(prompts, expert_weights=name).logits for name in ("math", "code", "base")]
    chat = None
    # A template is compiled when a chat is rendered; a damaged one is seen before that by its checksum alone.
    if tokenizer is not None and renders:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "w7 w8 w60"}], tokenize=False)
        chat = (chat, tokenizer("w7 w8 w60")["input_ids"])
    return (*(tensor.tolist() for tensor in (*route[:3], *logits)), chat, model.generation_config.to_dict())


# --- mutations ------------------------------------------------------------------------------------------------------


def flip_bits(path: Path, draw: random.Random) -> str:
    """One to four bits."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return "flip bits"


def cut(path: Path, draw: random.Random) -> str:
    """Cut short anywhere."""
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])
    return "cut short"


def stretch(path: Path, draw: random.Random) -> str:
    """Bytes added at the end or in the middle."""
    data = path.read_bytes()
    place = draw.choice([len(data), draw.randrange(len(data))])
    path.write_bytes(data[:place] + draw.randbytes(draw.randint(1, 64)) + data[place:])
    return "stretch"


def zero(path: Path, draw: random.Random) -> str:
    """A stretch of zeros, as a full disk leaves it."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.randint(1, 4096))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return "zeros"


def remove(path: Path, draw: random.Random) -> str:
    """The file is gone, is a folder, or is empty."""
    path.unlink()
    kind = draw.choice(["missing", "folder", "empty"])
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    return kind


def edit_json(path: Path, draw: random.Random) -> str:
    """One value, name or entry, anywhere in it."""
    content = json.loads(path.read_text())
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key in node:
                places.append((node, key))
                walk(node[key])
        elif isinstance(node, list):
            for number, item in enumerate(node[:50]):
                places.append((node, number))
                walk(item)

    walk(content)
    if not places:
        return flip_bits(path, draw)
    node, key = draw.choice(places)
    kind = draw.choice(["value", "value", "drop", "rename", "swap", "nest", "digits"])
    if kind == "value":
        node[key] = draw.choice(ODD_VALUES)  # type: ignore[index]
    elif kind == "drop":
        del node[key]  # type: ignore[attr-defined]
    elif kind == "rename" and isinstance(node, dict):
        name = str(key)
        node[name[: draw.randrange(len(name) + 1)] + draw.choice("xyz_")] = node.pop(key)
    elif kind == "swap":
        others = [place for place in places if type(place[0][place[1]]) is type(node[key])]  # type: ignore[index]
        other, place = draw.choice(others)
        node[key], other[place] = other[place], node[key]  # type: ignore[index]
    text = json.dumps(content)
    if kind in ("nest", "digits"):
        marker = json.dumps("MARKER")
        node[key] = "MARKER"  # type: ignore[index]
        text = json.dumps(content).replace(marker, "[" * 50_000 + "]" * 50_000 if kind == "nest" else "9" * 5000, 1)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"json {kind}"


def edit_tensors(path: Path, draw: random.Random) -> str:
    """Tensors swapped, dropped, renamed, changed, of another dtype or shape; the file stays well-formed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kind = draw.choice(["swap", "swap", "drop", "rename", "value", "nan", "dtype", "shape", "more", "zero"])
    name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    tensor = tensors[name]
    if kind == "swap":
        alike = [key for key in tensors if tensors[key].shape == tensor.shape and tensors[key].dtype == tensor.dtype]
        other = draw.choice(sorted(alike))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[name + draw.choice("xyz")] = tensors.pop(name)
    elif kind == "more":
        tensors["more"] = torch.ones(3)
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice([torch.float16, torch.int32, torch.uint8, torch.float64]))
    elif kind == "shape":
        tensors[name] = tensor.flatten()[: draw.randrange(tensor.numel() + 1)]
    elif tensor.numel():
        flat = tensor.flatten()
        place = draw.randrange(flat.numel())
        if kind == "nan" and flat.is_floating_point():
            flat[place] = draw.choice([float("nan"), float("inf"), -float("inf")])
        elif kind == "zero":
            flat.zero_()
        else:
            flat[place] = flat[place] + 1
        tensors[name] = flat.reshape(tensor.shape)
    save_file(tensors, path, metadata={"format": "pt"})
    return f"tensors {kind}"


def edit_header(path: Path, draw: random.Random) -> str:
    """The JSON header of a safetensors file, its length kept in step or not."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = path.with_name("header.json")
    header.write_bytes(data[8 : 8 + length])
    kind = edit_json(header, draw)
    text = header.read_bytes()
    header.unlink()
    size = len(text) if draw.random() < 0.9 else draw.choice([0, 2**40, 2**63, length])
    path.write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    return f"header {kind}"


def mutate(out: Path, draw: random.Random) -> str:
    """One mutation of one file; a word on what was done."""
    paths = [
        path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja")
    ]
    path = draw.choice([path for path in paths if "report" not in path.parts])
    plain = [flip_bits, cut, stretch, zero, remove]
    kinds: list[Callable[[Path, random.Random], str]] = {
        ".json": [*plain, edit_json, edit_json, edit_json, edit_json],
        ".safetensors": [*plain, edit_tensors, edit_tensors, edit_tensors, edit_header, edit_header],
    }.get(path.suffix, plain)
    return f"{path.relative_to(out)}: {draw.choice(kinds)(path, draw)}"


# --- outcome ----------------------------------------------------------------------------------------------------------


def outcome(out: Path, expected: tuple[object, ...], verify_files: bool, renders: bool) -> tuple[str, str]:
    """Class of outcome, and what there is to say of it."""
    try:
        found = result(out, verify_files, renders)
    except MediatorError as fault:
        return OUR_ERROR, str(fault).splitlines()[0]
    except Exception as fault:
        return OTHER, f"{type(fault).__name__}: {fault}\n{traceback.format_exc(limit=-3)}"
    return (SAME, "") if found == expected else (DIFFERENT, "")


def run(
    count: int,
    seed: int,
    folder: Path,
    verify_files: bool = True,
    forget: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Counter[str], list[str]]:
    """Mutate ``count`` copies of one output, each by its own seed.

    Args:
        count: how many.
        seed: of the first one.
        folder: to work in.
        verify_files: as ``load_mediator`` takes it.
        forget: without checksums, as a former version wrote outputs.
        say: gets a line for every foreign exception and every other result, and one for every thousand mutations.

    Returns:
        Class of outcome → count, and a line for every outcome that must not be.
    """
    whole = make_output(folder)
    if forget:
        (whole / "mediator" / CHECKSUM_FILE).unlink()
    renders = verify_files and not forget
    expected = result(whole, verify_files, renders)
    counts: Counter[str] = Counter()
    faults = []
    for number in range(seed, seed + count):
        damaged = folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        kind = mutate(damaged, random.Random(number))
        found, why = outcome(damaged, expected, verify_files, renders)
        counts[found] += 1
        line = f"seed {number}, {kind}: {found} {why}"
        if found in (OTHER, DIFFERENT):
            say(line)
        if found == OTHER or (found == DIFFERENT and verify_files and not forget):
            faults.append(line)
        if (number - seed) % 1000 == 999:
            say(f"after {number - seed + 1}: {dict(counts)}")
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-verify", action="store_true", help="load with verify_files=False: no foreign exceptions")
    parser.add_argument("--forget", action="store_true", help="delete the checksums first: no foreign exceptions")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checked = not given.no_verify
        say = partial(print, flush=True)
        counts, faults = run(given.count, given.seed, Path(folder), checked, given.forget, say)
    print(
        {name: counts[name] for name in (OUR_ERROR, SAME, OTHER, DIFFERENT)}, f"{time.perf_counter() - started:.0f} s"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

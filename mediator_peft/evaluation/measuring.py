"""measure_statistics(): side files for merge methods that need more than the weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.fingerprint import fingerprint_of
from ..checkpoints.headers import lay_out
from ..checkpoints.output_folder import check_space
from ..checkpoints.replacing import write_replacing
from ..context_length import table_of_positions
from ..data_files import DataFileError, parse_json
from ..errors import CheckpointError, ConfigError, OutputError, OutputExistsError
from ..merge.builder import peak_memory
from ..progress import Progress, no_progress
from ..structure import find_structure
from ..tables import unknown_name
from .prompts import read_prompts, render, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .model_statistics import Statistic, TokenSequence

SIDE_VERSION = 1
_KEY_FILE = "key.json"
# All that is ever in a working folder; the second form is safetensors' own, while it writes.
_PART = re.compile(r"key\.json|(group|sums)-\d+\.(safetensors|new)|whole\.new|\.tmp.*")
_SECONDS_BETWEEN_SAVES = 60


@dataclass
class MeasureReport:
    """What was measured."""

    output: str
    statistic: str
    num_sequences: int
    num_tokens: int
    num_tensors: int
    """Tensors of the model that have this statistic; layers that read one input share one."""

    num_passes: int
    """How often the sequences were gone through, so that sums fit into the memory."""

    file_bytes: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def measure_statistics(
    model_path: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    statistic: str = "gram",
    *,
    text_column: str = "prompt",
    answer_column: str | None = None,
    use_template: bool = True,
    max_sequences: int | None = None,
    max_tokens: int = 512,
    seed: int = 0,
    memory_of_sums: int = 2 << 30,
    progress: Progress = no_progress,
) -> MeasureReport:
    """Measure one statistic of one model on prompts, and write it as a side file.

    Sums are kept for as many tensors at a time as ``memory_of_sums`` holds; the sequences are gone through once for
    each such group. Sums are saved every minute beside the output: a measurement that was killed goes on where it was
    when it is run again, and the bytes are the same. The file appears when all is done.

    Args:
        model_path: folder or hub id of a model, or of a LoRA adapter, which is merged into its base first.
        prompts: JSONL file.
        output: safetensors file that does not exist yet; ``<expert>.safetensors`` for ``merge_data``.
        statistic: ``"gram"``, ``"fisher"`` or ``"norms"``.
        text_column: column of the prompts.
        answer_column: column of their answers; None takes the prompts alone.
        use_template: whether prompts are rendered with the chat template.
        max_sequences: the first ones of the file; None takes all.
        max_tokens: a sequence is cut off here.
        seed: of the labels of Fisher information.
        memory_of_sums: bytes.
        progress: told of each sequence done.

    Raises:
        ConfigError: the statistic or a number is unknown or out of range.
        DataFileError: the prompts cannot be used.
        CheckpointError: the model cannot be loaded, or gives NaN or infinity.
        OutputExistsError: the output is there already.
        OutputError: it cannot be written.
    """
    from .model_statistics import STATISTICS, shared_inputs

    started, cpu_started = time.perf_counter(), time.process_time()
    target = Path(output).expanduser().absolute()
    _check(target, statistic, STATISTICS, max_sequences, max_tokens, memory_of_sums)
    texts = read_prompts(Path(prompts), text_column)[:max_sequences]
    answers = None if answer_column is None else read_prompts(Path(prompts), answer_column)[:max_sequences]
    model, tokenizer = load_plain(str(model_path))
    max_tokens = min(max_tokens, table_of_positions(model) or max_tokens)
    sequences = _sequences(tokenizer, texts, answers, use_template, max_tokens)
    measured = STATISTICS[statistic](model, find_structure(model), seed)
    header = _header(measured, str(model_path), sequences, shared_inputs(measured, sequences))
    shared = json.loads(header["shared"])
    shapes = {name: shape for name, shape in measured.shapes().items() if name not in shared}
    groups = list(_groups(shapes, measured.bytes_per_entry, memory_of_sums))
    check_space(target, 8 * sum(prod(shape) for shape in shapes.values()))
    key = {**header, "memory_of_sums": str(memory_of_sums)}
    with (
        _partial_folder(target, key) as partial,
        progress(f"measuring {statistic}", len(groups) * len(sequences)) as advance,
    ):
        for number, names in enumerate(groups):
            _measure_group(measured, sequences, {name: shapes[name] for name in names}, partial, number, advance)
        _put_together(partial, len(groups), shapes, header, target)
    return MeasureReport(
        output=str(target),
        statistic=statistic,
        num_sequences=len(sequences),
        num_tokens=int(header["num_tokens"]),
        num_tensors=len(shapes) + len(shared),
        num_passes=len(groups),
        file_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_memory_bytes=peak_memory(),
    )


def _check(
    target: Path,
    statistic: str,
    known: Mapping[str, Any],
    max_sequences: int | None,
    max_tokens: int,
    memory_of_sums: int,
) -> None:
    if statistic not in known:
        raise ConfigError(unknown_name(statistic, known, "statistic"))
    for name, number, least in (
        ("max_sequences", max_sequences, 1), ("max_tokens", max_tokens, 2), ("memory_of_sums", memory_of_sums, 1)
    ):  # fmt: skip
        if number is not None and (not isinstance(number, int) or number < least):
            raise ConfigError(f"{name} must be a whole number, {least} or more, got {number!r}.")
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target.name!r} must end in .safetensors, e.g. side/maths.safetensors.")
    if os.path.lexists(target):
        raise OutputExistsError(f"{target} is there already. Remove it, or choose another name.")


def load_plain(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 on the CPU, and its tokenizer; of an adapter, merged into its base.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        if (Path(path).expanduser() / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as fault:
        raise CheckpointError(f"model {path!r} cannot be loaded: {fault}") from fault
    return model.eval(), tokenizer


def _sequences(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str] | None,
    use_template: bool,
    max_tokens: int,
) -> list[TokenSequence]:
    from .model_statistics import TokenSequence

    found = []
    for number, prompt in enumerate(prompts):
        ids = token_ids(tokenizer, render(tokenizer, prompt, use_template))
        start = 0
        if answers is not None:
            start = max(0, len(ids) - 1)
            ids = [*ids, *tokenizer(answers[number], add_special_tokens=False)["input_ids"]]
        if ids and start < max_tokens - 1:
            found.append(TokenSequence(tuple(ids[:max_tokens]), start))
    if not found:
        raise DataFileError(f"no prompt leaves room for an answer within max_tokens={max_tokens}. Raise it.")
    return found


def _header(
    measured: Statistic, source: str, sequences: Sequence[TokenSequence], shared: Mapping[str, str]
) -> dict[str, str]:
    digest = hashlib.sha256(json.dumps([[list(each.ids), each.start] for each in sequences]).encode())
    return {
        "side_version": str(SIDE_VERSION),
        "statistic": measured.name,
        "model": source,
        "fingerprint": json.dumps(fingerprint_of(dict(measured.model.named_parameters()))),
        "prompts_sha256": digest.hexdigest(),
        "num_sequences": str(len(sequences)),
        "num_tokens": str(sum(len(each.ids) for each in sequences)),
        "seed": str(measured.seed),
        "shared": json.dumps(dict(shared), sort_keys=True),
    }


def _groups(shapes: Mapping[str, tuple[int, ...]], bytes_per_entry: int, limit: int) -> Iterator[list[str]]:
    """Names of tensors whose sums fit into the memory together; one tensor at the least."""
    group: list[str] = []
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * bytes_per_entry
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


@contextmanager
def _partial_folder(target: Path, key: Mapping[str, str]) -> Iterator[Path]:
    """Where finished groups and sums lie until the file is whole; emptied where it is of another measurement.

    Raises:
        OutputError: it cannot be made, or something else is in its place.
        OutputExistsError: another process is measuring into it.
    """
    partial = target.parent / f".{target.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(partial)
    except OSError as fault:
        raise OutputError(f"{str(target)!r} cannot be written: {fault.strerror or fault}") from fault
    try:
        _clear_unless(partial, json.dumps(dict(key), sort_keys=True))
        yield partial
    finally:
        os.close(descriptor)


def _lock(partial: Path) -> int:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError:
        os.close(descriptor)
        raise OutputExistsError(f"another process is measuring into {str(partial)!r}. Wait for it.") from None
    return descriptor


def _clear_unless(partial: Path, key: str) -> None:
    """Empty a working folder of another measurement; the key file is what marks it as one of ours.

    Raises:
        OutputError: something else is in its place.
    """
    key_file = partial / _KEY_FILE
    try:
        found = [entry for entry in partial.iterdir() if not entry.name.startswith(f".{_KEY_FILE}.")]
        strange = [entry for entry in found if _PART.fullmatch(entry.name) is None or not _is_own(entry)]
        if partial.is_symlink() or strange or (found and not _holds_key(key_file)):
            what = strange[0] if strange else partial
            raise OutputError(f"{str(what)!r} is in the way and no part of a measurement. Move it away.")
        if found and key_file.read_text(encoding="utf-8") == key:
            return
        for entry in found:
            if entry.name != _KEY_FILE:
                entry.unlink()
        write_replacing(key_file, key)
    except OSError as fault:
        raise OutputError(f"{str(partial)!r} cannot be written: {fault.strerror or fault}") from fault


def _is_own(entry: Path) -> bool:
    """Whether an entry is a file that nothing else shares."""
    state = entry.lstat()
    return stat.S_ISREG(state.st_mode) and state.st_nlink == 1


def _holds_key(path: Path) -> bool:
    try:
        return isinstance(parse_json(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _measure_group(
    measured: Statistic,
    sequences: Sequence[TokenSequence],
    shapes: Mapping[str, tuple[int, ...]],
    partial: Path,
    number: int,
    advance: Any,
) -> None:
    done_file, sums_file = partial / f"group-{number}.safetensors", partial / f"sums-{number}.safetensors"
    if done_file.exists():
        return
    sums, first = _saved_sums(sums_file)
    sums = sums or {name: torch.zeros(shape, dtype=measured.dtype) for name, shape in shapes.items()}
    saved = time.monotonic()
    for place in range(first, len(sequences)):
        measured.add(sums, sequences[place], place)
        advance()
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
            _save(sums, sums_file, {"next": str(place + 1)})
            saved = time.monotonic()
    num_tokens = sum(len(each.ids) for each in sequences)
    found = {name: measured.finish(total, len(sequences), num_tokens) for name, total in sums.items()}
    bad = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(f"the model gives NaN or infinity on these prompts, first at {bad[0]!r}. Is it damaged?")
    _save(found, done_file, {})
    sums_file.unlink(missing_ok=True)


def _saved_sums(path: Path) -> tuple[dict[str, Tensor], int]:
    if not path.exists():
        return {}, 0
    with safe_open(str(path), framework="pt") as file:
        names: list[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}, int(file.metadata()["next"])


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    new = path.with_suffix(".new")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, new, metadata)
        os.replace(new, path)
    except (OSError, SafetensorError) as fault:
        raise OutputError(f"{str(path.parent)!r} cannot be written: {fault}") from fault


def _put_together(
    partial: Path, num_groups: int, shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, str], target: Path
) -> None:
    """One file of all groups, in place when it is on the disk."""
    head, places = lay_out({name: ("F32", shape) for name, shape in shapes.items()}, header)
    new = partial / "whole.new"
    try:
        with open(new, "wb") as output:
            output.write(head)
            for number in range(num_groups):
                with safe_open(str(partial / f"group-{number}.safetensors"), framework="pt") as file:
                    names: list[str] = file.keys()
                    for name in names:
                        output.seek(places[name].offset)
                        output.write(file.get_tensor(name).numpy().tobytes())
            output.flush()
            os.fsync(output.fileno())
        os.replace(new, target)
    except OSError as fault:
        raise OutputError(f"{str(target)!r} cannot be written: {fault.strerror or fault}") from fault
    shutil.rmtree(partial, ignore_errors=True)

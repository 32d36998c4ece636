"""The rules that carry the layout: imports go one way, no modules import each other, private names stay private."""

import ast
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny_checkpoints

PACKAGE = Path(__file__).parents[1] / "mediator_peft"

# Parts of the package, in the order of the data: each may import from the parts above it, and from itself.
ORDER = (
    *("errors", "tables", "data_files", "time_limit", "progress", "optional", "ranks", "deferred", "storage"),
    *("structure", "context_length", "registration", "forking"),
    *(
        "reference",
        "methods",
        "kernels",
        "routing",
        "registry",
        "setting_checks",
        "config",
        "saved_settings",
        "presets",
        "checkpoints",
        "bank",
        "merge",
        "tuner",
    ),
    *("evaluation", "demo", "study", "cli"),
)
# What starts the package: they import any part, and none imports them.
ENTRY = ("__init__", "__main__")


def module_name(path):
    """Dotted name of a file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = sorted(PACKAGE.rglob("*.py"))


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path):
    """Modules of the package that a file imports, at its top, in functions and under ``TYPE_CHECKING``."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                stem = here[: len(here) - node.level + 1]
            elif (node.module or "").split(".")[0] == "mediator_peft":
                stem = ()
            else:
                continue
            own = (node.module or "").split(".")[0 if node.level else 1 :] if node.module else []
            module = ".".join([*stem, *own])
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield (inner if inner in MODULES else module), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mediator_peft."):
                    yield alias.name.removeprefix("mediator_peft."), None


IMPORTS = {
    name: {module for module, _ in imported_modules(path) if module and module != name}
    for name, path in MODULES.items()
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    part = name.split(".")[0]
    if part in ENTRY:
        return
    allowed = ORDER[: ORDER.index(part) + 1]
    wrong = sorted(module for module in IMPORTS[name] if module.split(".")[0] not in allowed)
    assert not wrong, f"{name} must not import {wrong}: parts may import what stands above them in ORDER"


def cycles(imports):
    """Circles of modules that import each other (Tarjan's strongly connected components of two or more)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in sorted(imports):
        if name not in index:
            visit(name)
    return found


def test_a_cycle_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other():
    # A package's ``__init__`` is imported with each of its modules, but only names re-exported from it are edges here.
    assert cycles(IMPORTS) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_stay_in_their_file(name):
    private = sorted(
        f"{module}.{alias}"
        for module, alias in imported_modules(MODULES[name])
        if alias and alias.startswith("_") and not alias.startswith("__")
    )
    assert not private, f"{name} imports {private}: a leading underscore means this file only"


def private(name):
    return name.startswith("_") and not name.startswith("__") and not hasattr(namedtuple("Any", ""), name)


def private_attributes(path):
    """Private methods and attributes: (those a file defines, those it uses of objects other than ``self``)."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and private(node.name):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                used.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and private(node.target.id):
            defined.add(node.target.id)
    return defined, used


ATTRIBUTES = {name: private_attributes(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_attributes_stay_in_their_file(name):
    defined, used = ATTRIBUTES[name]
    elsewhere = set().union(*(other for module, (other, _) in ATTRIBUTES.items() if module != name))
    wrong = sorted((used - defined) & elsewhere)
    assert not wrong, f"{name} uses {wrong} of other files: a leading underscore means this file only"


# Methods that make the attributes of an object; PEFT has its own ``__init__`` and calls the second from there.
MAKERS = ("__init__", "_pre_injection_hook", "_start", "__setstate__")


def attributes_set(node, by_makers):
    """Names set on ``self`` in the methods of a class that are makers, or in those that are not."""
    return {
        inner.attr
        for method in node.body
        if isinstance(method, ast.FunctionDef) and (method.name in MAKERS) == by_makers
        for inner in ast.walk(method)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
        if isinstance(inner.value, ast.Name) and inner.value.id == "self"
    }


CLASSES = [
    pytest.param(node, id=f"{name}.{node.name}")
    for name, path in MODULES.items()
    if name.startswith("tuner.")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
]


@pytest.mark.parametrize("node", CLASSES)
def test_classes_of_the_tuner_make_their_attributes_in_one_place(node):
    # A dataclass declares its fields.
    if not node.decorator_list:
        late = attributes_set(node, by_makers=False) - attributes_set(node, by_makers=True)
        assert not late, f"{node.name} sets {sorted(late)} first outside of {MAKERS}"


@pytest.mark.parametrize("node", CLASSES)
def test_no_class_of_the_tuner_declares_members_of_another(node):
    hidden = [inner for inner in node.body if isinstance(inner, ast.If)]
    assert not hidden, f"{node.name} declares members under a condition; hand it the object that has them"


def test_importing_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('bitsandbytes', 'matplotlib', 'gguf', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import mediator_peft\n"
        "assert 'numba' not in sys.modules and 'mediator_peft.cli.app' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


SLOW_TO_IMPORT = ("torch", "peft", "transformers", "datasets", "accelerate", "bitsandbytes", "numba")


def test_building_by_default_needs_neither_torch_nor_transformers(tmp_path):
    """From experts in float32, and from those in bfloat16 of a base in float32; nor does looking at the result."""
    whole = write_tiny_checkpoints(tmp_path / "float32", names=["base", "math", "code"])
    half = write_tiny_checkpoints(tmp_path / "bfloat16", names=["base", "math", "code"], dtype=torch.bfloat16)
    code = f"""
import sys
from mediator_peft import build_mediator, plan_mediator, verify_mediator
from mediator_peft.cli.app import app
base = {str(whole["base"])!r}
for math, code in {[(str(paths["math"]), str(paths["code"])) for paths in (whole, half)]!r}:
    out = {str(tmp_path)!r} + "/" + math.split("/")[-2] + "-out"
    plan_mediator(base, {{"math": math, "code": code}})
    build_mediator(base, {{"math": math, "code": code}}, out)
    assert verify_mediator(out).is_ok
    for arguments in (["inspect", out], ["methods"], ["env"]):
        app(arguments, standalone_mode=False)
loaded = [name for name in {SLOW_TO_IMPORT} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


FIRST_IMPORTS = (
    "import mediator_peft, peft",
    "import peft, mediator_peft",
    "import mediator_peft.cli.app, peft",
    "from mediator_peft import MediatorConfig",
    "import mediator_peft.tuner",
    "import mediator_peft.tuner.layer",
    "import mediator_peft.tuner.loading",
)


# Of what PEFT and this package import, what itself imports neither.
IMPORTED_BY_BOTH = ("bitsandbytes", "datasets", "accelerate")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_peft_knows_the_method_whoever_is_imported_first():
    """Each order in a fork of one process, which has imported what both packages need and neither of them."""
    code = f"""
import gc, os, sys, traceback
import torch, transformers, transformers.modeling_utils, transformers.pytorch_utils
from importlib import import_module
for name in {IMPORTED_BY_BOTH!r}:
    try:
        import_module(name)
    except ImportError:
        pass
assert "peft" not in sys.modules and "mediator_peft" not in sys.modules
# Imports make objects that stay: looking through them for garbage takes as long as some imports.
gc.disable()
for first in {FIRST_IMPORTS!r}:
    child = os.fork()
    if not child:
        try:
            exec(first)
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
            from mediator_peft import MediatorConfig, MediatorModel
            assert PEFT_TYPE_TO_CONFIG_MAPPING["MEDIATOR"] is MediatorConfig
            assert PEFT_TYPE_TO_TUNER_MAPPING["MEDIATOR"] is MediatorModel
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(first)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    import mediator_peft

    for name in mediator_peft.__all__:
        assert getattr(mediator_peft, name).__name__ == name
        assert name in dir(mediator_peft)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = mediator_peft.nonesuch


# What these write lies in a working folder, or in one that is replaced as a whole: a kill leaves nothing half of it.
WRITES_IN_PLACE = {
    *("checkpoints.replacing", "checkpoints.backbone_files", "checkpoints.adapter_files", "checkpoints.output_folder"),
    *("merge.journal", "merge.report", "merge.offline", "merge.plain_merge", "merge.provenance", "tuner.saving"),
    *("evaluation.report", "evaluation.fit_and_save", "evaluation.measuring", "evaluation.routing_report"),
    *("routing.feature_cache", "bank.expert_store", "demo.training", "demo.train_expert", "cli.common", "__main__"),
}
WRITERS = {"write_text", "write_bytes", "savefig"}


def writes_in_place(path):
    """Lines of a file that call what writes a file under its final name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            is_open = name in ("open", "fdopen") and any(
                mode in ("w", "wb", "a", "ab", "x", "xb", "w+b") for mode in modes
            )
            if name in WRITERS or is_open:
                yield node.lineno


def test_files_that_users_name_are_written_under_another_name_first():
    """Elsewhere ``write_replacing``, ``write_figure``, ``write_json`` or ``replaced_file`` are used."""
    found = {name: list(writes_in_place(path)) for name, path in MODULES.items() if name not in WRITES_IN_PLACE}
    assert not {name: lines for name, lines in found.items() if lines}

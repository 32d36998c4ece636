"""``mediator-peft env``: what a bug report needs to say about this machine."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .common import AsJson, console, print_json

PACKAGES = ("mediator_peft", "torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "zstandard")
OPTIONAL = {
    "bitsandbytes": "4-bit and 8-bit backbones, encodings int8 and nf4",
    "matplotlib": "figures",
    "triton": "kernels on GPUs",
    "gguf": "the demo's base model",
}


def env(as_json: AsJson = False) -> None:
    """Print versions, the kernels in use and the optional packages that are absent.

    Example:
      mediator-peft env --json
    """
    found = environment()
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {detail}" for key, detail in value.items()) or "none"
        console().print(f"{name.replace('_', ' ')}: {value}", highlight=False)


def environment() -> dict[str, Any]:
    """The same as plain data."""
    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: number for name, number in versions.items() if number is not None},
        **_kernels(),
        "optional_and_absent": {name: f"({use})" for name, use in OPTIONAL.items() if versions[name] is None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    """Which kernels compute on the CPU, their instruction set, and why it is not the native ones."""
    from ..kernels import dispatch, native_kernels

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        is_native = dispatch.has_native()
    if is_native:
        return {"kernels": "native", "instruction_set": native_kernels.instruction_set()}
    if os.environ.get(dispatch.CHOICE):
        return {"kernels": "numpy", "reason": f"{dispatch.CHOICE} is set"}
    try:
        native_kernels.library()
    except native_kernels.NativeKernelsMissing as fault:
        return {"kernels": "numpy", "reason": str(fault)}
    return {"kernels": "numpy", "reason": "unknown"}

"""Builds the native kernels into the package, where there is a C++17 compiler; without one the install goes on.

Everything else is in ``pyproject.toml``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("mediator_peft") / "kernels" / "native"
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-w", "-g0"]
# No contraction of products and sums: results must not depend on the instruction set more than they have to.
COMMON += ["-ffp-contract=off"]
PLAIN = ("kernels_baseline.cpp", "api.cpp", "team.cpp", "sha256.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS_OF = {
    "x86_64": {"kernels_avx2.cpp": AVX2, "kernels_avx512.cpp": AVX512},
    "aarch64": {"kernels_neon.cpp": []},
}


def machine() -> str:
    """The processor that is compiled for."""
    name = platform.machine().lower()
    if sys.platform == "darwin":
        # One processor a library, even where Python itself serves two: each has flags of its own.
        name = os.environ.setdefault("ARCHFLAGS", f"-arch {name}").split()[-1]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def source_digest() -> str:
    """As ``native_kernels.source_digest`` computes it."""
    digest = hashlib.sha256()
    for path in sorted(NATIVE.glob("*.*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class BuildNative(build_ext):
    """One plain shared library, each instruction set compiled with flags of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        # It is loaded by ctypes and is independent of Python's version.
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as fault:
            print(
                f"warning: the native kernels were not built, numpy will do their work, many times slower: {fault}",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise RuntimeError("no Windows build yet")
        flags = {
            "kernels_baseline.cpp": [],
            "api.cpp": [],
            "team.cpp": [],
            "sha256.cpp": [],
            **FLAGS_OF.get(machine(), {}),
        }
        macros = [("MEDIATOR_SOURCE_DIGEST", f'"{source_digest()}"')]
        objects = []
        for name, extra in flags.items():
            options = [*COMMON, *extra]
            objects += self.compiler.compile(
                [str(NATIVE / name)], self.build_temp, macros, depends=ext.depends, extra_postargs=options
            )
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


class PlatformWheel(bdist_wheel):
    """Any Python 3 on this platform: there is no Python ABI in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


machine()
sources = sorted(str(path) for path in NATIVE.glob("*.cpp"))
headers = sorted(str(path) for path in NATIVE.glob("*.[hi]*"))
setup(
    ext_modules=[Extension("mediator_peft.kernels._native", sources, depends=headers, language="c++", optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)

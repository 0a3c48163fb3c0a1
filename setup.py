"""Builds the CPU kernels (csrc/). Everything else is in pyproject.toml.

They need PyTorch's headers, 2.10 or newer, and a C++20 compiler; without those the package installs all the same, and says at run time that
slower kernels are used. One build serves later PyTorch versions too: it is written against the stable ABI.

SQPLUS_CXXFLAGS adds flags of the compiler, for `make sanitize` and `make emulate`; what does not compile is an error then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_torch() -> Path | None:
    """PyTorch's directory, also where pip builds in isolation: that hides the environment's packages, but not their place."""
    spec = importlib.util.find_spec("torch")
    places = (
        [Path(spec.origin).parent] if spec and spec.origin else [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    )
    return next((place for place in places if (place / "include").is_dir()), None)


class BuildAtOnce(build_ext):
    """As many files at a time as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        one_by_one = self.compiler.compile

        def compile(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for each in pool.map(lambda source: one_by_one([source], **options), sources) for made in each]

        self.compiler.compile = compile
        super().build_extension(ext)


flags = os.environ.get("SQPLUS_CXXFLAGS", "").split()
torch = find_torch()
if torch is None:
    sys.stderr.write("PyTorch is not installed: the CPU kernels are not built.\n")
    setup()
else:
    kernels = Extension(
        "smoothquant_plus._cpu",
        [str(path) for path in sorted(Path("csrc").glob("*.cpp"))],
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "c10"],
        # Loops that compare floats are vectorized only where no comparison is to raise an exception of the processor's. Products are added
        # without rounding only where the code says so, or levels would differ. Symbols as of PyTorch 2.10.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-fno-trapping-math",
            "-ffp-contract=off",
            "-Wno-uninitialized",  # GCC 12's own headers for AVX-512 set off both
            "-Wno-maybe-uninitialized",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *flags,
        ],
        extra_link_args=flags,
        language="c++",
        py_limited_api=True,  # it has no Python in it
        optional=not flags,
    )
    setup(ext_modules=[kernels], cmdclass={"build_ext": BuildAtOnce}, options={"bdist_wheel": {"py_limited_api": "cp310"}})

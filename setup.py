"""Builds the CPU kernels (csrc/). Everything else is in pyproject.toml.

They need PyTorch's headers and a C++20 compiler; without those the package installs all the same, and says at run time that slower kernels are
used. One build serves PyTorch 2.10 and later: it is written against the stable ABI.

SQPLUS_CXXFLAGS adds flags of the compiler, for `make sanitize` and `make emulate`; what does not compile is an error then.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

options = {}
flags = os.environ.get("SQPLUS_CXXFLAGS", "").split()
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.stderr.write("PyTorch is not there (or hidden by build isolation): the CPU kernels are not built.\n")
else:
    kernels = CppExtension(
        "smoothquant_plus._cpu",
        [str(path) for path in sorted(Path("csrc").glob("*.cpp"))],
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", *flags],
        extra_link_args=flags,
        py_limited_api=True,
    )
    kernels.optional = not flags  # where it does not compile, the package works without
    options = {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

setup(**options)

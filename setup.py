"""Builds the Cython kernels of cython_ext/ as cascadefs.ext.*; everything else is declared in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Errors, Options
from setuptools import Extension, setup

Options.warning_errors = True
Errors.LEVEL = 1

KERNELS = sorted(Path("cython_ext").glob("*.pyx"))
LIBRARIES = {"hashing": ["xxhash"], "index_pages": ["xxhash"], "listing": ["sqlite3"]}

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"cascadefs.ext.{kernel.stem}",
                [str(kernel)],
                depends=[str(header) for header in Path("cython_ext").rglob("*.pxd")],
                extra_compile_args=["-O3", "-pthread"],
                extra_link_args=["-pthread"],
                libraries=LIBRARIES.get(kernel.stem, []),
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"), ("_GNU_SOURCE", "1")],
            )
            for kernel in KERNELS
        ],
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False},
    )
)

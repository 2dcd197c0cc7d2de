"""What pyproject.toml can't say: the extensions, and what building them requires."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

HEADERS = {
    "fuse3 >= 3.8": "the headers of libfuse 3.8 or later",
    "libzstd >= 1.5": "the headers of libzstd 1.5 or later",
    "libdeflate": "the headers of libdeflate",
    "libcrypto >= 3": "the headers of OpenSSL 3 or later",
}
"""What the extensions use, as pkg-config names it, and as an error does."""

DECODER = Extension(
    "pbsfs.formats._decoder",
    ["pbsfs/formats/_decoder.c"],
    libraries=["crypto", "deflate", "zstd"],
    extra_compile_args=["-Wall", "-Wextra"],
    py_limited_api=True,
)


def check_requirements() -> None:
    """Ends with one line, if what cffi and the compiler require is missing."""
    missing = []
    if shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is None:
        missing.append("a C compiler")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("the headers of Python")
    if shutil.which("pkg-config") is None:
        missing.append("pkg-config")
    else:
        missing += [name for package, name in HEADERS.items() if not _is_installed(package)]
    if missing:
        sys.exit(
            f"pbsfs: building requires {', '.join(missing)}; "
            "run: apt install gcc libc6-dev libdeflate-dev libfuse3-dev libssl-dev libzstd-dev pkg-config "
            "python3-dev"
        )


def _is_installed(package: str) -> bool:
    return subprocess.run(["pkg-config", "--exists", package], check=False).returncode == 0


check_requirements()
setup(ext_modules=[DECODER], cffi_modules=["pbsfs/fuse/shim_build.py:builder"])

"""What pyproject.toml can't say: the extension that cffi generates, and what building it requires."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup


def check_requirements() -> None:
    """Ends with one line, if what cffi and the compiler require is missing."""
    missing = []
    if shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is None:
        missing.append("a C compiler")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("the headers of Python")
    if shutil.which("pkg-config") is None:
        missing.append("pkg-config")
    elif subprocess.run(["pkg-config", "--exists", "fuse3 >= 3.8"], check=False).returncode != 0:
        missing.append("the headers of libfuse 3.8 or later")
    if missing:
        sys.exit(
            f"pbsfs: building requires {', '.join(missing)}; "
            "run: apt install gcc libc6-dev libfuse3-dev pkg-config python3-dev"
        )


check_requirements()
setup(cffi_modules=["pbsfs/fuse/shim_build.py:builder"])

"""Only what pyproject.toml can't say: the extension that cffi generates."""

from setuptools import setup

setup(cffi_modules=["pbsfs/fuse/lseek_build.py:builder"])

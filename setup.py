"""Only what pyproject.toml can't say: the extension that cffi generates."""

from setuptools import setup

setup(cffi_modules=["pbsfs/fuse/shim_build.py:builder"])

"""Benchmarks of pbsfs: `python -m bench`. Run by hand; see README.md beside this file."""

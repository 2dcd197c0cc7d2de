"""What is inside an archive or a disk: entries and their bytes, read over streams.

Readers of contents are plain synchronous code over `Stream`: no trio, no I/O of pbsfs. So they can be tested
and fuzzed without a mount, and `pbsfs.reader` decides in which thread they run.
"""

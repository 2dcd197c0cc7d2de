"""The files in disk images: partition tables, volume managers and file systems, as synchronous readers.

A disk is written by the machine that it belongs to, so nothing in it is believed. Nothing here imports trio
or does I/O of its own: a reader reads `Volume`s, and those read `contents.base.Stream`s.
"""

"""NTFS, as Windows XP to 11 and Linux write it: a synchronous reader over a volume.

Entry point: `ntfs.Ntfs`. The journal ($LogFile) is not replayed; `facts` gives its state.
"""

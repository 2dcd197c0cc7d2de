"""Bytes to values and back: blobs, indexes, manifests, keys.

Pure: no I/O, no async, no logging; safe to call from any thread. Everything that comes in is
untrusted: lengths, counts and offsets are checked before they size an allocation or a loop, and what
fails a check raises `pbsfs.base.errors.DamageError`. The formats are those of proxmox-backup 3.2.4.
"""

"""Bytes to values and back: blobs, indexes, manifests, keys.

Pure: no I/O, no async, no logging; safe to call from any thread. All input is untrusted: these modules check
lengths, counts and offsets before they size an allocation or a loop, and raise
`pbsfs.base.errors.DamageError` if a check fails. The formats are those of proxmox-backup 3.2.4.
"""

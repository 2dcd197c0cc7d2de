"""ISO 9660 with Rock Ridge or Joliet: the file system of optical discs and of installers.

Formats: ECMA-119, IEEE P1281 (SUSP), P1282 (Rock Ridge), the Joliet specification; and what fs/isofs of the
kernel makes of them.
"""

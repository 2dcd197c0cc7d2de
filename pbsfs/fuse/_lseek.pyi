"""What `pbsfs.fuse.lseek` uses of the extension that `lseek_build.py` makes."""

from collections.abc import Callable

_Seek = Callable[[int, int, int, int], int]

class _Ffi:
    def def_extern(self, *, name: str, error: int) -> Callable[[_Seek], _Seek]: ...

class _Lib:
    def pbsfs_lseek_enable(self) -> None: ...

ffi: _Ffi
lib: _Lib

# What nbdkit's Python plugin gives to scripts (nbdkit-python-plugin(3)), as far as nbd_bridge.py uses it.

CACHE_NATIVE: int
EXTENT_HOLE: int
EXTENT_ZERO: int
FLAG_REQ_ONE: int
THREAD_MODEL_PARALLEL: int

def export_name() -> str: ...
def set_error(err: int) -> None: ...

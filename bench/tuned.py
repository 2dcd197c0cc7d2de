"""pbsfs with other limits: `python -m bench.tuned MODULE.NAME=VALUE … -- ARGUMENTS`.

NAME is a constant of the module, or a field of the module's `DEFAULT`.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys


def change(setting: str) -> None:
    """Makes one change, `MODULE.NAME=VALUE`. Call it before anything imports what uses the module."""
    name, _equals, value = setting.partition("=")
    module, _dot, constant = name.rpartition(".")
    found = importlib.import_module(f"pbsfs.{module}")
    limits = getattr(found, "DEFAULT", None)
    is_field = hasattr(limits, constant)
    if not isinstance(getattr(limits if is_field else found, constant), int | float):
        raise SystemExit(f"pbsfs.{name} is not a number")
    number = float(value) if "." in value else int(value)
    if limits is not None and is_field:
        found.DEFAULT = dataclasses.replace(limits, **{constant: number})  # type: ignore[attr-defined]
    else:
        setattr(found, constant, number)


def main() -> None:
    end = sys.argv.index("--")
    for setting in sys.argv[1:end]:
        change(setting)
    sys.argv = ["pbsfs", *sys.argv[end + 1 :]]
    from pbsfs.cli import main as run  # noqa: PLC0415 - after the changes

    run()


if __name__ == "__main__":
    main()

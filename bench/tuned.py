"""pbsfs with other values of its constants: `python -m bench.tuned MODULE.NAME=VALUE … -- ARGUMENTS`."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    end = sys.argv.index("--")
    for setting in sys.argv[1:end]:
        name, _equals, value = setting.partition("=")
        module, _dot, constant = name.rpartition(".")
        found = importlib.import_module(f"pbsfs.{module}")
        if not isinstance(getattr(found, constant), int | float):
            raise SystemExit(f"pbsfs.{name} is no number")
        setattr(found, constant, float(value) if "." in value else int(value))
    sys.argv = ["pbsfs", *sys.argv[end + 1 :]]
    from pbsfs.cli import main as run  # noqa: PLC0415 - after the constants were set

    run()


if __name__ == "__main__":
    main()

"""The command: `python -m bench`."""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from bench import plots, report
from bench.cases import ALL
from bench.measures import GIB, BenchError
from bench.plan import Bench, Peers, Result, run_case
from bench.serving import CHECKOUT
from pbsfs.runtime import process


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures pbsfs; see bench/README.md."
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these benchmarks")
    parser.add_argument(
        "--quick", action="store_true", help="small data: whether it works, no numbers to keep"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the results there, as SVG")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir(), "pbsfs-bench"),
        help="where the data is kept from run to run (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where copies go (default: /dev/shm, or --data)"
    )
    parser.add_argument("--client", type=Path, metavar="PATH", help="the vendor's proxmox-backup-client")
    parser.add_argument(
        "--library", type=Path, metavar="PATH", help="the vendor's libproxmox_backup_qemu.so.0"
    )
    parser.add_argument("--c-plugin", type=Path, metavar="PATH", help="the C plugin for nbdkit")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {case.name for case in ALL}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; --list says what there is")
    for path in (options.client, options.library, options.c_plugin):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    return options


def _scratch(options: argparse.Namespace) -> Path:
    if options.scratch is not None:
        return Path(options.scratch)
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 4 * GIB else options.data


def _terminated(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = _options()
    if options.list:
        width = max(len(case.name) for case in ALL)
        for case in ALL:
            print(f"{case.name:<{width}}  {case.measures}")
        return 0
    process.use_one_arena()  # as pbsfs itself does: the limits are to be the same program's
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    # As installers do. Where Python may not write bytecode, each start would compile it: 0.1 s.
    compileall.compile_dir(CHECKOUT / "pbsfs", quiet=1)
    options.data.mkdir(parents=True, exist_ok=True)
    peers = Peers(options.client, options.library, options.c_plugin)
    results: list[Result] = []
    interrupted = False
    about = report.machine()
    print("  ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="pbsfs-bench-home-") as home,
        tempfile.TemporaryDirectory(prefix="pbsfs-bench-", dir=_scratch(options)) as scratch,
    ):
        repeat = max(1, options.repeat)
        bench = Bench(options.data, Path(home), Path(scratch), options.quick, repeat, peers)
        try:
            for case in ALL:
                if options.only is None or case.name in options.only:
                    results.append(run_case(bench, case))
                    print(f"\n{report.table(results[-1])}", flush=True)
        except KeyboardInterrupt:
            print("\ninterrupted: what there is so far:", file=sys.stderr)
            interrupted = True
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    print(f"\n{report.summary(results)}")
    if options.json is not None:
        options.json.write_text(report.as_json(results, about))
    if options.plots is not None:
        plots.write(results, options.plots)
    if interrupted:
        return 128 + signal.SIGINT
    return 1 if any(result.error for result in results) else 0


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main())

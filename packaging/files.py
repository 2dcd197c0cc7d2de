"""The files of the Debian package, except those that pip installs: `python3 packaging/files.py STAGE`.

`scripts/package` runs it with the Python of the staged environment, so that manual pages and completion
describe what the package contains. It writes below STAGE:

- `DEBIAN/`: control, and the maintainer scripts of `packaging/debian`
- `/usr/bin`, `/usr/sbin`: the programs that pyproject.toml names, and mount helpers
- manual pages, completion for three shells, documents, units of `packaging/systemd`
- nbdkit's plugin `pbs`
"""

from __future__ import annotations

import gzip
import platform
import re
import stat
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import manual
from click.shell_completion import get_completion_class

from pbsfs import __version__
from pbsfs.cli import cli

CHECKOUT = Path(__file__).resolve().parent.parent
HOME = "usr/lib/pbsfs"
"""The virtual environment in the package. `scripts/package` uses the same path."""
SITE = f"{HOME}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
DOCS = "usr/share/doc/pbsfs"

COPIED = (
    ("packaging/systemd/*.service", "usr/lib/systemd/system", 0o644),
    ("packaging/systemd/*.socket", "usr/lib/systemd/system", 0o644),
    ("packaging/systemd/*.sysusers", "usr/lib/sysusers.d", 0o644),
    ("packaging/systemd/*.tmpfiles", "usr/lib/tmpfiles.d", 0o644),
    ("packaging/sbin/*", "usr/sbin", 0o755),
    ("packaging/debian/copyright", DOCS, 0o644),
)
"""Files that are installed unchanged: a pattern in the checkout, the directory, and the mode."""

LIBRARIES = ("libcrypto", "libdeflate", "libfuse3", "libzstd")
"""What the extensions are linked with, except the C library."""

DOCUMENTS = ("*.md", "LICENSE", "docs/**/*.md", "docs/**/*.svg", "bench/README.md")
"""Files that are installed below DOCS by the same paths, so that the links between them work."""

COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/pbsfs",
    "zsh": "usr/share/zsh/vendor-completions/_pbsfs",
    "fish": "usr/share/fish/vendor_completions.d/pbsfs.fish",
}

PROGRAM = """\
#!/{home}/bin/python3 -I
import sys

from {module} import {function}

sys.exit({function}())
"""

PLUGIN = """\
#!/bin/sh
# `nbdkit pbs …` runs this script with its own arguments.
VIRTUAL_ENV=/{home} exec /usr/bin/nbdkit python /{site}/nbd_bridge.py "$@"
"""


def main() -> None:
    stage = Path(sys.argv[1])
    for path, (content, mode) in files().items():
        _write(stage / path, content, mode)
    size = sum(path.lstat().st_size for path in stage.rglob("*") if path.is_file())
    for path, (content, mode) in control_files(size).items():
        _write(stage / path, content, mode)


def files() -> dict[str, tuple[bytes, int]]:
    """What is installed: the content and mode of each path."""
    return {
        **dict(_copied()),
        **dict(_documents()),
        **dict(_programs()),
        **{
            f"usr/share/man/{name}.gz": (gzip.compress(page.encode(), mtime=0), 0o644)
            for name, page in manual.pages().items()
        },
        **{path: (_completion(shell), 0o644) for shell, path in COMPLETIONS.items()},
        f"{DOCS}/changelog.gz": (gzip.compress((CHECKOUT / "CHANGELOG.md").read_bytes(), mtime=0), 0o644),
        f"usr/lib/{sysconfig.get_config_var('MULTIARCH')}/nbdkit/plugins/nbdkit-pbs-plugin": (
            PLUGIN.format(home=HOME, site=SITE).encode(),
            0o755,
        ),
    }


def control_files(size: int) -> dict[str, tuple[bytes, int]]:
    """The files in `DEBIAN/`, for a package whose files have `size` bytes."""
    values = {
        "VERSION": debian_version(__version__, platform.freedesktop_os_release()),
        "ARCHITECTURE": _output("dpkg", "--print-architecture"),
        "SIZE": str(-(-size // 1024)),
        "PYTHON": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "LIBRARIES": ", ".join(_package_of(name) for name in LIBRARIES),
    }
    folder = CHECKOUT / "packaging/debian"
    control = re.sub("@([A-Z]+)@", lambda found: values[found[1]], (folder / "control").read_text("utf-8"))
    scripts = [script for name in ("postinst", "prerm", "postrm") if (script := folder / name).exists()]
    return {
        "DEBIAN/control": (control.encode(), 0o644),
        **{f"DEBIAN/{script.name}": (script.read_bytes(), 0o755) for script in scripts},
    }


def debian_version(version: str, release: Mapping[str, str]) -> str:
    """The package's version: a candidate sorts before its release, and Debian 12 before Debian 13."""
    name = {"debian": "deb"}.get(release["ID"], release["ID"])
    sortable = re.sub(r"(?<=\d)(a|b|rc)", r"~\1", version).replace(".dev", "~~dev")
    return f"{sortable}+{name}{release.get('VERSION_ID', '')}"


def _copied() -> Iterator[tuple[str, tuple[bytes, int]]]:
    for pattern, directory, mode in COPIED:
        for source in sorted(CHECKOUT.glob(pattern)):
            name = source.name
            if source.suffix in (".sysusers", ".tmpfiles"):
                name = f"{source.stem}.conf"
            yield f"{directory}/{name}", (source.read_bytes(), mode)


def _documents() -> Iterator[tuple[str, tuple[bytes, int]]]:
    for pattern in DOCUMENTS:
        for source in sorted(CHECKOUT.glob(pattern)):
            yield f"{DOCS}/{source.relative_to(CHECKOUT)}", (source.read_bytes(), 0o644)


def _programs() -> Iterator[tuple[str, tuple[bytes, int]]]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    for name, function in project["scripts"].items():
        directory = "usr/sbin" if name.startswith("mount.") else "usr/bin"
        module, name_in_it = function.split(":")
        text = PROGRAM.format(home=HOME, module=module, function=name_in_it)
        yield f"{directory}/{name}", (text.encode(), 0o755)


def _completion(shell: str) -> bytes:
    completer = get_completion_class(shell)
    assert completer is not None
    return f"{completer(cli, {}, 'pbsfs', '_PBSFS_COMPLETE').source()}\n".encode()


def _package_of(library: str) -> str:
    """The package of the `library` that an extension was linked with."""
    import pbsfs.formats._decoder  # noqa: PLC0415 - both load the libraries
    import pbsfs.fuse._shim  # noqa: F401, PLC0415

    mapped = Path("/proc/self/maps").read_text("utf-8", errors="replace")
    names = set(re.findall(rf"/({library}\.so\.[0-9.]+)$", mapped, re.MULTILINE))
    if len(names) != 1:
        sys.exit(f"package: pbsfs uses {len(names)} versions of {library} ({', '.join(names)}), not one")
    # By its name alone: dpkg may know the directory as /lib, which is now a link to /usr/lib.
    return _output("dpkg-query", "--search", f"*/{names.pop()}").split(":")[0]


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(stat.S_IFREG | mode)


if __name__ == "__main__":
    main()

"""The C decoder with sanitizers for addresses and undefined behaviour, on damaged and mutated chunks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

import pbsfs
from tests.support import stored_chunks
from tests.support.hostile import counts
from tests.support.program import environment, output_of, run

SOURCE = Path(pbsfs.__file__).parent / "formats" / "_decoder.c"
CHECKOUT = SOURCE.parents[2]


def build(source: str, directory: Path, *options: str) -> Path:
    """The extension with sanitizers, whose first finding ends the process. `options`: of the compiler."""
    (directory / "_decoder.c").write_text(source)
    output_of(
        *("gcc", "-g", "-O1", "-shared", "-fPIC", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *("-I", sysconfig.get_paths()["include"], directory / "_decoder.c", "-o", directory / "_decoder.so"),
        *("-lcrypto", "-ldeflate", "-lzstd", *options),
    )
    return directory / "_decoder.so"


def compare_all(extension: Path, mutations: int) -> subprocess.CompletedProcess[str]:
    """Runs this file below on the sanitized extension."""
    library = output_of("gcc", "-print-file-name=libasan.so").strip()
    variables = environment(
        LD_PRELOAD=library,
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter has many; test_decoder.py looks for the extension's
        PYTHONMALLOC="malloc",  # so that bytes after an object are seen to be none of it
    )
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.chunks.test_sanitized",
        extension,
        str(mutations),
    ]
    return run(command, env=variables, cwd=CHECKOUT, timeout=900)


@pytest.mark.parametrize("mutations", counts(20, 3000))
@pytest.mark.parametrize("options", [(), ("-DPBSFS_WITHOUT_LANES",)], ids=["lanes", "without lanes"])
def test_the_sanitizers_find_nothing(tmp_path: Path, options: tuple[str, ...], mutations: int) -> None:
    done = compare_all(build(SOURCE.read_text(), tmp_path, *options), mutations)

    assert (done.returncode, done.stderr) == (0, "")
    assert f"{mutations} mutated" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("check", "instead"),
    [
        ("if (size != task->length)", "if (0)"),
        ("(size_t)task->raw.len < header ||", ""),
        ("size < 6 ||", ""),
        ("content, length, data, size)", "content, length + 4096, data, size)"),
        ("rest %= BLOCK;", ""),
    ],
)
def test_the_sanitizers_find_a_check_that_is_missing(tmp_path: Path, check: str, instead: str) -> None:
    source = SOURCE.read_text()
    assert source.count(check) == 1
    done = compare_all(build(source.replace(check, instead), tmp_path), 0)

    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: " in done.stderr


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pbsfs.formats._decoder", path)
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


if __name__ == "__main__":
    found = stored_chunks.compare_all(load(Path(sys.argv[1])), range(int(sys.argv[2])))
    print(f"{found['good']} good, {found['bad']} bad, {int(sys.argv[2])} mutated")

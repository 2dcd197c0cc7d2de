"""Settings: what may be said is understood, and what makes no sense is refused with a word why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.access.options import REPOSITORY_VARIABLE, SourceOptions, names_source, resolve
from pbsfs.access.resolve import describe
from pbsfs.access.sizes import MIN_CACHE_SIZE, parse_cache_size, parse_size
from pbsfs.base.errors import SourceError, UsageError
from pbsfs.sources.base import Source
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter

# --- the source


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPOSITORY_VARIABLE, raising=False)


def opened(datastore_dir: Path | None = None, repository: str | None = None) -> Source:
    """The source that these options name."""
    options = resolve(SourceOptions(repository, datastore_dir), os.environ)
    return describe(options, os.environ, None).access.open()


def test_a_directory_is_a_source(writer: DatastoreWriter) -> None:
    source = opened(writer.path)
    assert isinstance(source, DirectorySource)
    assert source.path == writer.path


def test_a_relative_directory_is_made_absolute(
    writer: DatastoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(writer.path.parent)
    source = opened(Path(writer.path.name))
    monkeypatch.chdir("/")

    assert isinstance(source, DirectorySource)
    assert source.path == writer.path


def test_a_directory_that_is_named_wins_over_the_environment(
    writer: DatastoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REPOSITORY_VARIABLE, "server:store")
    assert isinstance(opened(writer.path), DirectorySource)


def test_two_sources_are_one_too_many(writer: DatastoreWriter) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        opened(writer.path, "server:store")


def test_no_source_is_one_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in (None, ""):
        if empty is not None:
            monkeypatch.setenv(REPOSITORY_VARIABLE, empty)
        with pytest.raises(UsageError, match="with --datastore-dir or PBSFS_DATASTORE_DIR"):
            opened()


def test_a_directory_that_is_no_datastore_is_a_fault_of_the_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a datastore"):
        opened(tmp_path)


# --- what the options leave open, the environment completes


ANY = {"PBS_SERVER": "env", "PBS_PORT": "1", "PBS_DATASTORE": "stored", "PBS_AUTH_ID": "u@pbs!t"}


def resolved(options: SourceOptions, **environment: str) -> str | Path | None:
    """The repository or directory that is meant."""
    found = resolve(options, environment)
    return found.repository if found.datastore_dir is None else found.datastore_dir


@pytest.mark.parametrize(
    ("options", "environment", "source"),
    [
        (SourceOptions(), ANY, "u@pbs!t@env:1:stored"),
        (SourceOptions(), {"PBS_DATASTORE": "s"}, "root@pam@localhost:8007:s"),
        (SourceOptions(), {"PBS_SERVER": "fd00::1", "PBS_DATASTORE": "s"}, "root@pam@[fd00::1]:8007:s"),
        (SourceOptions(), {"PBS_SERVER": "[fd00::1]", "PBS_DATASTORE": "s"}, "root@pam@[fd00::1]:8007:s"),
        (SourceOptions(), {**ANY, "PBS_REPOSITORY": "h:s"}, "root@pam@h:8007:s"),
        (SourceOptions(), {**ANY, "PBS_REPOSITORY": ""}, "u@pbs!t@env:1:stored"),
        (SourceOptions(server="opt"), {**ANY, "PBS_REPOSITORY": "h:s"}, "u@pbs!t@opt:1:stored"),
        (SourceOptions(port=2), ANY, "u@pbs!t@env:2:stored"),
        (SourceOptions(datastore="opt"), {}, "root@pam@localhost:8007:opt"),
        (SourceOptions(datastore="opt", auth_id="me@pam"), ANY, "me@pam@env:1:opt"),
        (SourceOptions(repository="h:s"), {**ANY, "PBSFS_DATASTORE_DIR": "/usr"}, "root@pam@h:8007:s"),
        (SourceOptions(datastore="opt"), {**ANY, "PBSFS_DATASTORE_DIR": "/usr"}, "u@pbs!t@env:1:opt"),
        (SourceOptions(), {**ANY, "PBS_REPOSITORY": "h:s", "PBSFS_DATASTORE_DIR": "/usr"}, Path("/usr")),
        (SourceOptions(datastore_dir=Path("/opt")), {"PBSFS_DATASTORE_DIR": "/usr"}, Path("/opt")),
        (SourceOptions(), {**dict.fromkeys(ANY, ""), "PBS_DATASTORE": "s"}, "root@pam@localhost:8007:s"),
    ],
)
def test_options_go_before_variables_and_whole_ones_before_parts(
    options: SourceOptions, environment: dict[str, str], source: str | Path
) -> None:
    assert resolved(options, **environment) == source


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (SourceOptions(repository="h:s", server="x"), {}, "--repository and --server exclude"),
        (SourceOptions(server="x", datastore_dir=Path("/")), {}, "--server and --datastore-dir exclude"),
        (SourceOptions(server="x"), {"PBS_REPOSITORY": "h:s"}, "with --datastore or PBS_DATASTORE"),
        (SourceOptions(), {"PBS_SERVER": "x"}, "with --datastore or PBS_DATASTORE"),
        (SourceOptions(), {"PBS_PORT": "x", "PBS_DATASTORE": "s"}, "PBS_PORT: 'x' is not a port"),
        (SourceOptions(server=""), {"PBS_SERVER": "x", "PBS_DATASTORE": "s"}, "--server is empty"),
        (SourceOptions(repository=""), {"PBS_REPOSITORY": "h:s"}, "is not a repository"),
    ],
)
def test_options_that_name_no_source_are_refused(
    options: SourceOptions, environment: dict[str, str], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        resolved(options, **environment)


def test_repository_and_fingerprint_come_from_descriptors_files_and_commands(tmp_path: Path) -> None:
    (file := tmp_path / "fingerprint").write_text("AB\n")
    reading, writing = os.pipe()
    os.write(writing, b"h:s\n")
    os.close(writing)
    told = {"PBS_REPOSITORY_FD": str(reading), "PBS_FINGERPRINT_FILE": str(file)}
    found = resolve(SourceOptions(), told)
    assert (found.repository, found.fingerprint) == ("root@pam@h:8007:s", "AB")
    assert resolve(found, told) == found, "nothing is read twice"
    found = resolve(SourceOptions(), {"PBS_REPOSITORY_CMD": "echo h:s", "PBS_FINGERPRINT_CMD": "echo AB"})
    assert (found.repository, found.fingerprint) == ("root@pam@h:8007:s", "AB")
    with pytest.raises(UsageError, match="PBS_REPOSITORY_CMD: "):
        resolved(SourceOptions(), PBS_REPOSITORY_CMD="false")


def test_a_namespace_comes_from_the_environment_unless_one_is_given() -> None:
    told = {"PBS_REPOSITORY": "h:s", "PBS_NAMESPACE": "prod"}
    assert resolve(SourceOptions(), told).namespace == "prod"
    assert resolve(SourceOptions(namespace=""), told).namespace == ""


def test_a_directory_in_the_environment_that_is_not_there_says_what_it_hides() -> None:
    told = {"PBSFS_DATASTORE_DIR": "/nowhere", "PBS_REPOSITORY": "h:s"}
    with pytest.raises(
        SourceError,
        match=r"^PBSFS_DATASTORE_DIR: /nowhere: No .*; correct or unset it.* PBS_REPOSITORY is not used",
    ):
        resolved(SourceOptions(), **told)


@pytest.mark.parametrize(
    "name", ["PBS_REPOSITORY", "PBS_REPOSITORY_FD", "PBS_DATASTORE", "PBSFS_DATASTORE_DIR"]
)
def test_an_environment_names_a_source_or_does_not(name: str, tmp_path: Path) -> None:
    assert names_source({name: "x"})
    assert not names_source({name: ""})
    assert not names_source({"PBS_SERVER": "x", "CREDENTIALS_DIRECTORY": str(tmp_path)})
    (tmp_path / "proxmox-backup-client.repository").write_text("x")
    assert names_source({"CREDENTIALS_DIRECTORY": str(tmp_path)})


# --- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("1k", 1024),
        ("256M", 256 << 20),
        ("256 MiB", 256 << 20),
        (" 2gb ", 2 << 30),
        ("1T", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 10**15), st.sampled_from(["", "K", "m", "GiB", " TB"]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    factor = 1024 ** " kmgt".index(unit.strip().lower()[:1] or " ")
    assert parse_size(f"{number}{unit}") == number * factor


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "+1", "1.5G", "1,5G", "0x10", "1P", "1MM", "1 0", "1e3", "much", "9" * 19, "1\n2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_a_cache_holds_two_of_the_largest_chunks_at_least() -> None:
    assert parse_cache_size("32M") == MIN_CACHE_SIZE == 2 * (16 << 20)
    assert parse_cache_size("1G") == 1 << 30
    for text in ("0", "31M", str(MIN_CACHE_SIZE - 1)):
        with pytest.raises(UsageError, match="the least is 32M"):
            parse_cache_size(text)


def test_a_cache_is_not_larger_than_the_memory() -> None:
    for text in ("999T", "16384T"):
        with pytest.raises(UsageError, match=r"^a cache of .* is too large: this computer has \d+M; "):
            parse_cache_size(text)

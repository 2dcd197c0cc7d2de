"""The cache on disk, by the real program: shared, offline, looked at, pruned and warmed."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support import damage
from tests.support.mounts import mounted
from tests.support.nbd import nbdkit
from tests.support.needs import need_another_user
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.serving import STORE, access, serving
from tests.support.stocked import CONFIGURATION, FIRST, IMAGE, NEWER_IMAGE, Stocked, stock

CHUNK_REQUEST = "/chunk?digest="


def entries(cache: Path) -> dict[str, int]:
    """How many entries there are, by kind."""
    found: dict[str, int] = json.loads(output_of(PBSFS, "cache", "info", "--json", "--cache-dir", cache))[
        "entries"
    ]
    return found


def test_a_second_export_fetches_no_chunk(server: ReferenceServer, stocked: Stocked, tmp_path: Path) -> None:
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
    output_of(PBSFS, "export", IMAGE, tmp_path / "first", env=env)
    fetched, sessions = server.requests.count(CHUNK_REQUEST), server.requests.count("/reader")
    assert fetched == entries(tmp_path / "cache")["chunk"] > 1
    output_of(PBSFS, "export", IMAGE, tmp_path / "second", env=env)
    assert server.requests.count(CHUNK_REQUEST) == fetched
    assert server.requests.count("/reader") == sessions  # not even a session
    for name in ("first", "second"):
        assert (tmp_path / name).read_bytes() == stocked.contents[IMAGE]
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_mount_an_nbd_server_and_an_export_share_it(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
    with (
        mounted(env, tmp_path / "first") as first,
        mounted(env, tmp_path / "second", "--cache-disk-size", "1G") as second,
        nbdkit(env, f"path={IMAGE}", "cache_disk_size=1G") as nbd,
    ):
        (tmp_path / "image").write_bytes(stocked.contents[IMAGE])
        readers = [
            subprocess.Popen(["cmp", place / IMAGE, tmp_path / "image"])
            for place in (first.place, second.place)
        ]
        assert nbd.read() == stocked.contents[IMAGE]
        assert [reader.wait() for reader in readers] == [0, 0]
        output_of(PBSFS, "export", IMAGE, tmp_path / "copy", env=env)
        numbers = json.loads(output_of(PBSFS, "stats", "--json", first.place))
        metered = numbers["disk_cache_hits"] + numbers["disk_cache_misses"]
        assert metered > 0
    assert server.requests.count(CHUNK_REQUEST) == entries(tmp_path / "cache")["chunk"]


def test_offline_what_was_read_is_read_again_without_the_server(stocked: Stocked, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(stocked.path) as server:
        env = access(server)
        output_of(PBSFS, "cache", "warm", "--cache-dir", cache, FIRST, env=env)
        listed = output_of(PBSFS, "ls", "--cache-dir", cache, FIRST, env=env)
        repository = env["PBS_REPOSITORY"]
    offline = ("--offline", "--cache-dir", cache, "--repository", repository)
    plain = environment()  # without a password, and nothing to trust
    assert output_of(PBSFS, "ls", *offline, FIRST, env=plain) == listed
    output_of(PBSFS, "export", *offline, IMAGE, tmp_path / "copy", env=plain)
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IMAGE]
    shown = output_of(PBSFS, "cat", *offline, CONFIGURATION, env=plain)
    assert shown.encode() == stocked.contents[CONFIGURATION]
    with mounted(plain, tmp_path / "m", *map(str, offline)) as mount:
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
    missing = error_of(pbsfs("export", *offline, NEWER_IMAGE, tmp_path / "newer", env=plain), 4)
    assert "offline, and " in missing
    assert f"is not in cache {cache}; read it once without --offline" in missing


def test_a_server_that_is_unreachable_is_told_with_what_can_be_read(stocked: Stocked, tmp_path: Path) -> None:
    with serving(stocked.path) as server:
        env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
        unread = access(server, PBSFS_CACHE_DIR=str(tmp_path / "other"))
        output_of(PBSFS, "ls", FIRST, env=env)
    hint = f"; with --offline, pbsfs reads what is kept in cache {tmp_path / 'cache'}"
    untrusted = {name: value for name, value in env.items() if name != "PBS_FINGERPRINT"}
    for each in (env, untrusted):  # without a fingerprint, the server is asked for its certificate first
        assert error_of(pbsfs("ls", FIRST, env=each), 14).endswith(hint)
    assert "--offline" not in error_of(pbsfs("ls", FIRST, env=unread), 14)
    output_of(PBSFS, "ls", "--offline", FIRST, env=untrusted)


def test_verify_reads_the_source_and_not_the_cache(tmp_path: Path) -> None:
    stocked = stock(tmp_path / "store")
    with serving(stocked.path) as server:
        env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
        output_of(PBSFS, "cache", "warm", FIRST, env=env)
        for path in (stocked.path / ".chunks").glob("*/*"):
            if path.stat().st_size > 1000:
                damage.flip_bit(path, 800)
        output_of(PBSFS, "export", IMAGE, tmp_path / "copy", env=env)
        done = pbsfs("verify", FIRST, env=env)
        assert (done.returncode, "damaged" in done.stdout) == (6, True)
        error = error_of(pbsfs("verify", "--offline", env=env), 2)
        assert error == "--offline: verify reads what is stored in the source; leave it out"


def test_info_prune_and_warm(server: ReferenceServer, stocked: Stocked, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    env = access(server, PBSFS_CACHE_DIR=str(cache))
    said = output_of(PBSFS, "cache", "warm", FIRST, env=env).splitlines()
    assert said[0].endswith("0 damaged, 0 not checked")
    assert said[1].endswith(f" added to {cache}")
    shown = output_of(PBSFS, "cache", "info", env=env)
    assert shown.startswith(f"directory               {cache}\nsize ")
    assert "\nindexes and blobs       2, " in shown
    assert "\nlast used  " in shown
    server.requests.clear()
    output_of(PBSFS, "cache", "warm", IMAGE, env=env)
    assert server.requests.count(CHUNK_REQUEST) == 0
    assert output_of(PBSFS, "cache", "prune", "--keep", "1G", env=env) == f"removed 0 B from {cache}\n"
    assert output_of(PBSFS, "cache", "prune", env=env).startswith("removed ")
    assert set(entries(cache).values()) == {0}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("ls", "--offline"),
            "--offline: no cache on disk is named; name it with --cache-dir or PBSFS_CACHE_DIR",
        ),
        (("ls", "--cache-disk-size", "1M"), "a cache on disk of 1M is too small; the least is 64M"),
        (
            ("cache", "warm", "vm/100"),
            "no cache on disk is named; name it with --cache-dir, PBSFS_CACHE_DIR or a profile",
        ),
        (
            ("cache", "info"),
            "no cache on disk is named; name it with --cache-dir, PBSFS_CACHE_DIR or a profile",
        ),
        (
            ("cache", "prune", "--cache-dir", "/nowhere"),
            "/nowhere: there is no cache of pbsfs; check --cache-dir",
        ),
        (
            ("cache", "warm", "--offline", "--cache-dir", "/nowhere", "vm/100"),
            "--offline: warm asks the source; leave it out",
        ),
    ],
)
def test_wrong_usage_says_what_is_right(server: ReferenceServer, words: tuple[str, ...], error: str) -> None:
    assert error_of(pbsfs(*words, env=access(server)), 2) == error


def test_a_wrong_size_in_the_environment_is_named(server: ReferenceServer, tmp_path: Path) -> None:
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path), PBSFS_CACHE_DISK_SIZE="much")
    assert error_of(pbsfs("ls", env=env), 2).startswith("PBSFS_CACHE_DISK_SIZE: 'much' is not a size")


def test_a_directory_uses_it_only_if_asked(stocked: Stocked, tmp_path: Path) -> None:
    words = ("export", "--datastore-dir", stocked.path, IMAGE)
    env = environment(PBSFS_CACHE_DIR=str(tmp_path / "cache"))
    output_of(PBSFS, *words, tmp_path / "first", env=env)
    assert not (tmp_path / "cache").exists()
    output_of(PBSFS, *words, "--cache-dir", tmp_path / "cache", tmp_path / "second")
    assert entries(tmp_path / "cache")["chunk"] > 1
    assert (tmp_path / "second").read_bytes() == stocked.contents[IMAGE]


def test_a_cache_that_cannot_be_written_is_an_error_of_warm(server: ReferenceServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server.requests.clear()
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "file"))
    error = f"cache {tmp_path}/file: Not a directory; name a directory that this user may write"
    assert error_of(pbsfs("cache", "warm", FIRST, env=env), 8) == error
    assert server.requests.count("") == 0


def test_a_cache_that_another_user_closed_costs_nothing_but_the_cache(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    need_another_user()
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for parent in (tmp_path, *tmp_path.parents):
        if stat.S_IMODE(parent.stat().st_mode) == 0o700:
            parent.chmod(0o755)
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    env = access(server) | {"HOME": "/nonexistent"}

    def run(*words: str) -> tuple[int, bytes, str]:
        words = (*user, str(PBSFS), *words, "--cache-dir", str(cache))
        done = subprocess.run(words, env=env, capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr.decode()

    status, shown, said = run("cat", IMAGE)
    assert (status, shown == stocked.contents[IMAGE]) == (0, True)
    assert said == (
        f"pbsfs: WARNING: cache {cache}: Permission denied; pbsfs reads from the source instead: "
        "check the directory, its disk and who may write there\n"
    )
    for word in ("info", "prune"):
        error = f"pbsfs: cache {cache}: Permission denied; run this as a user who may change it\n"
        assert run("cache", word) == (8, b"", error)
    error = f"pbsfs: cache {cache}: Permission denied; name a directory that this user may write\n"
    assert run("cache", "warm", IMAGE) == (8, b"", error)


def test_another_user_who_may_read_it_reads_from_it(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    need_another_user()
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.chown(cache, group=12345)
    cache.chmod(0o2750)
    env = access(server, PBSFS_CACHE_DIR=str(cache))
    output_of(PBSFS, "export", IMAGE, tmp_path / "first", env=env)
    before = entries(cache)
    for parent in (tmp_path, *tmp_path.parents):
        if stat.S_IMODE(parent.stat().st_mode) == 0o700:
            parent.chmod(0o755)
    server.requests.clear()
    words = ["setpriv", "--reuid=54321", "--regid=12345", "--clear-groups", PBSFS, "cat", IMAGE]
    done = subprocess.run(words, env=env | {"HOME": "/nonexistent"}, capture_output=True, check=False)
    assert (done.returncode, done.stdout == stocked.contents[IMAGE]) == (0, True), done.stderr
    assert server.requests.count(CHUNK_REQUEST) == 0
    output_of(PBSFS, "cache", "prune", env=env)
    done = subprocess.run(words, env=env | {"HOME": "/nonexistent"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert set(entries(cache).values()) == {0} != set(before.values())


def test_a_profile_names_it_and_config_check_looks_at_it(server: ReferenceServer, tmp_path: Path) -> None:
    env = access(server)
    config = tmp_path / "config/pbsfs/config.toml"
    config.parent.mkdir(parents=True)
    (tmp_path / "secret").write_text(env["PBS_PASSWORD"])
    (tmp_path / "secret").chmod(0o600)
    config.write_text(
        f'[profiles.home]\nrepository = "{env["PBS_REPOSITORY"]}"\nfingerprint = "{env["PBS_FINGERPRINT"]}"\n'
        f'password = {{ file = "{tmp_path}/secret" }}\ncache-dir = "{tmp_path}/cache"\n'
        'cache-disk-size = "64M"\n'
    )
    plain = environment(XDG_CONFIG_HOME=str(tmp_path / "config"))
    shown = output_of(PBSFS, "config", "check", "home", env=plain)
    assert "disk cache" in shown
    assert f"{tmp_path}/cache: 0 B of 64 MiB used" in shown
    output_of(PBSFS, "cache", "warm", "--profile", "home", IMAGE, env=plain)
    assert "chunks" in output_of(PBSFS, "cache", "info", "--profile", "home", env=plain)
    assert STORE in env["PBS_REPOSITORY"]

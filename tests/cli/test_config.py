"""Profiles as the source of commands, and the commands for the configuration; by the real program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.mounts import cleaned_up
from tests.support.needs import need_fuse
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.serving import SECRET, TOKEN, serving
from tests.support.stocked import CONFIGURATION, IMAGE, NEWER_IMAGE, Stocked, stock


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


@dataclass(frozen=True)
class User:
    """A home directory with a configuration, and the environment of its user."""

    home: Path

    @property
    def file(self) -> Path:
        return self.home / ".config" / "pbsfs" / "config.toml"

    @property
    def secret(self) -> Path:
        return self.home / "secret"

    def env(self, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in environment().items() if not name.startswith("XDG_")}
        return kept | {"HOME": str(self.home)} | changes

    def write(self, text: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(text)


def of_server(server: ReferenceServer, name: str = "home", more: str = "") -> str:
    return (
        f'[profiles.{name}]\nrepository = "{server.repository(TOKEN)}"\n'
        f'fingerprint = "{server.fingerprint}"\npassword = {{ file = "~/secret" }}\n{more}\n'
    )


@pytest.fixture
def user(tmp_path: Path) -> User:
    found = User(tmp_path / "user")
    found.home.mkdir()
    found.secret.write_text(f"{SECRET}\n")
    found.secret.chmod(0o600)
    return found


# --- a profile as the source


def test_a_path_names_the_profile(server: ReferenceServer, stocked: Stocked, user: User) -> None:
    user.write(of_server(server))
    env = user.env()
    assert output_of(PBSFS, "ls", "home:", env=env).split() == ["vm", "ct", "ns", "files"]
    assert output_of(PBSFS, "ls", "home:vm/100/latest", env=env).split() == ["drive-scsi0.img", "index.json"]
    both = output_of(PBSFS, "cat", f"home:{CONFIGURATION}", f"home:/{CONFIGURATION}", env=env)
    assert both.encode() == 2 * stocked.contents[CONFIGURATION]
    assert "ranges" in output_of(PBSFS, "diff", f"home:{IMAGE}", f"home:{NEWER_IMAGE}", env=env)
    assert output_of(PBSFS, "export", f"home:{IMAGE}", user.home / "copy", env=env) == ""
    assert (user.home / "copy").read_bytes() == stocked.contents[IMAGE]
    assert {record.user for record in server.requests.all() if record.user} == {TOKEN}


def test_options_variables_and_the_default_name_a_profile(server: ReferenceServer, user: User) -> None:
    user.write(of_server(server, "default") + of_server(server, "prod", 'namespace = "prod"'))
    assert output_of(PBSFS, "ls", env=user.env()).split() == ["vm", "ct", "ns", "files"]
    for arguments, env in (
        (["--profile", "prod"], user.env()),
        (["prod:"], user.env()),
        (["--profile", "prod"], user.env(PBSFS_PROFILE="default")),
        ([], user.env(PBSFS_PROFILE="prod")),
        (["--ns", "prod"], user.env()),
    ):
        assert output_of(PBSFS, "ls", *arguments, env=env).split() == ["vm", "files"]


def test_a_name_that_is_not_a_profile_is_a_path(stocked: Stocked, user: User) -> None:
    user.write(f'[profiles.default]\ndatastore-dir = "{stocked.path}"\n')
    assert "there is no 'other:vm'" in error_of(pbsfs("ls", "other:vm/100", env=user.env()), 3)
    assert output_of(PBSFS, "ls", IMAGE.rpartition("/")[0], env=user.env())
    error_of(pbsfs("diff", "default:vm/100", "vm/100", env=user.env()), 2)


def test_no_password_goes_to_a_server_that_it_is_not_for(
    server: ReferenceServer, stocked: Stocked, user: User
) -> None:
    with serving(stocked.path) as other:
        user.write(of_server(other, "other").replace('password = { file = "~/secret" }\n', ""))
        env = user.env(PBS_REPOSITORY=server.repository(TOKEN), PBS_PASSWORD=SECRET)
        assert "no password for" in error_of(pbsfs("ls", "other:", env=env), 2)
        assert other.requests.all() == []


def test_a_certificate_of_the_profiles_ca_is_trusted(stocked: Stocked, user: User) -> None:
    with ReferenceServer(stocked.path, store="store1", ca_signed=True) as server:
        server.add_user("reader@pbs", "x")
        server.add_token(TOKEN, SECRET)
        (user.home / "ca.pem").write_text(server.ca or "")
        text = (
            f'[profiles.home]\nrepository = "{server.repository(TOKEN, host="localhost")}"\n'
            'password = { file = "~/secret" }\n'
        )
        user.write(text)
        error_of(pbsfs("ls", "home:", env=user.env()), 12)
        user.write(f'{text}ca-file = "~/ca.pem"\n')
        assert output_of(PBSFS, "ls", "home:", env=user.env()).split() == ["vm", "ct", "ns", "files"]
        mount = user.home / "mnt"
        mount.mkdir()
        need_fuse()
        with cleaned_up(mount):
            output_of(PBSFS, "mount", "home:", mount, env=user.env())
            assert (mount / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]


def test_a_mount_takes_the_settings_of_its_profile(
    server: ReferenceServer, stocked: Stocked, user: User
) -> None:
    need_fuse()
    user.write(of_server(server, more='mount-options = ["umask=0337"]\ncache-size = "64M"'))
    (mount := user.home / "mnt").mkdir()
    with cleaned_up(mount):
        output_of(PBSFS, "mount", "home:", mount, env=user.env())
        assert mounted_at(mount)
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
        assert (mount / IMAGE).stat().st_mode & 0o777 == 0o440
        assert SECRET not in _command_lines()
        output_of(PBSFS, "umount", mount)
        output_of(PBSFS, "mount", "-o", "umask=0377", "--profile", "home", mount, env=user.env())
        assert (mount / IMAGE).stat().st_mode & 0o777 == 0o400


def test_a_path_after_the_profile_is_what_a_mount_shows(stocked: Stocked, user: User) -> None:
    need_fuse()
    user.write(f'[profiles.home]\ndatastore-dir = "{stocked.path}"\n')
    (mount := user.home / "mnt").mkdir()
    for source in ("home:vm/100", f"{stocked.path}:vm/100"):
        with cleaned_up(mount):
            output_of(PBSFS, "mount", source, mount, env=user.env())
            assert (mount / IMAGE.removeprefix("vm/100/")).read_bytes() == stocked.contents[IMAGE]
    done = pbsfs("mount", "--subtree", "vm", "home:vm/100", mount, env=user.env())
    assert error_of(done, 2).endswith("home:vm/100 names a path too; leave one of them out")


def test_a_mount_names_its_source_once(stocked: Stocked, user: User) -> None:
    user.write(f'[profiles.home]\ndatastore-dir = "{stocked.path}"\ncache-size = "1M"\n')
    (mount := user.home / "mnt").mkdir()
    for arguments, problem in (
        (["home:"], "profiles.home.cache-size: a cache of 1M is too small"),
        (["hoem:"], "'hoem:' is not a repository"),
        (["--profile", "hoem"], "profile 'hoem': not in the configuration; did you mean home?"),
        (["--profile", "home", "home:"], "an option names the source too"),
        (["home:", "more"], "one argument too many"),
    ):
        assert problem in error_of(pbsfs("mount", *arguments, mount, env=user.env()), 2)


def _command_lines() -> str:
    """The arguments and environments of all processes that may be read."""
    found = b""
    for name in ("cmdline", "environ"):
        for file in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                found += file.read_bytes()
            except OSError:
                continue  # ended, or of another user
    return found.decode(errors="replace")

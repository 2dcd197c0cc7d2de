"""Profiles as the source of commands, and the commands for the configuration; by the real program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.mounts import cleaned_up
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.serving import SECRET, TOKEN, serving
from tests.support.stocked import CONFIGURATION, IMAGE, NEWER_IMAGE, Stocked
from tests.support.strangers import closed_port
from tests.support.terminal import at_a_terminal


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
    assert "in 1 range" in output_of(PBSFS, "diff", f"home:{IMAGE}", f"home:{NEWER_IMAGE}", env=env)
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


def test_a_name_that_is_not_a_profile_is_refused(stocked: Stocked, user: User) -> None:
    user.write(f'[profiles.default]\ndatastore-dir = "{stocked.path}"\n')
    done = pbsfs("ls", "defalt:vm/100", env=user.env())
    assert error_of(done, 2) == "profile 'defalt': not in the configuration; did you mean default?"
    assert output_of(PBSFS, "ls", IMAGE.rpartition("/")[0], env=user.env())
    error_of(pbsfs("diff", "default:vm/100", "vm/100", env=user.env()), 2)
    done = pbsfs("ls", "--datastore-dir", stocked.path, "default:vm/100", env=user.env())
    assert "there is no 'default:vm'" in error_of(done, 3)


def test_nbd_serves_an_image_of_a_profile(server: ReferenceServer, stocked: Stocked, user: User) -> None:
    need("nbdkit", "nbdcopy")
    user.write(of_server(server, more='cache-size = "64M"'))
    look = 'cat /proc/[0-9]*/cmdline 2>/dev/null | tr "\\0" "\\n"'
    command = f'nbdcopy "$uri" copy && {look}'
    shown = output_of(PBSFS, "nbd", f"home:{IMAGE}", "--run", command, env=user.env(), cwd=user.home)
    assert f"cache_size={64 << 20}" in shown.splitlines()
    assert (user.home / "copy").read_bytes() == stocked.contents[IMAGE]
    assert SECRET not in shown
    user.write(of_server(server, more='cache-size = "1M"'))
    assert "cache of 1M is too small" in error_of(pbsfs("nbd", f"home:{IMAGE}", env=user.env()), 2)


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
        day = (mount / IMAGE).parent
        assert day.name.count(":") == 2
        expected = output_of(PBSFS, "ls", f"home:{IMAGE.rpartition('/')[0]}", env=user.env())
        assert output_of(PBSFS, "ls", day, env=user.env()) == expected
        assert output_of(PBSFS, "ls", day.name, env=user.env(), cwd=day.parent) == expected
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
    cases: list[tuple[list[str | Path], str]] = [
        (["home:"], "profiles.home.cache-size: a cache of 1M is too small"),
        (["hoem:"], "profile 'hoem': not in the configuration; did you mean home?"),
        (["--profile", "hoem"], "profile 'hoem': not in the configuration; did you mean home?"),
        (["--profile", "home", "home:"], "an option names the source too"),
        (["home:", "more"], "one argument too many"),
        (["home"], "'home' may be a profile or a datastore of this computer; write home: for the profile"),
        (["vm/100"], "'vm/100' is a path in a source and does not name one; write NAME:vm/100"),
        (["--datastore-dir", stocked.path, "files/vm/100"], "or give the path with --subtree"),
    ]
    for arguments, problem in cases:
        assert problem in error_of(pbsfs("mount", *arguments, mount, env=user.env()), 2)


# --- pbsfs config


def steps(*arguments: str, env: dict[str, str], status: int = 0) -> list[tuple[str, str, str]]:
    """The mark, the step and the text of each line of `pbsfs config check`."""
    done = pbsfs("config", "check", *arguments, env=env)
    assert (done.returncode, done.stderr) == (status, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return [(mark, step.rstrip(":"), text) for mark, step, text in lines]


def test_check_goes_through_each_step(server: ReferenceServer, user: User) -> None:
    user.write(of_server(server, more='mount-options = ["allow_other"]'))
    found = steps("home", env=user.env())
    assert [(mark, step) for mark, step, _text in found] == [
        *(("ok", step) for step in ("file", "profile", "mount", "source", "name", "connection")),
        *(("ok", step) for step in ("certificate", "password", "keys", "login", "backups")),
        ("warning", "keys"),  # of an encrypted backup
    ]
    texts = {step: text for _mark, step, text in found}
    assert texts["file"] == str(user.file)
    assert texts["password"] == f"found: file {user.secret}"
    assert texts["login"] == f"{TOKEN} is accepted"
    assert texts["backups"] == (
        "groups in the root namespace: 3; namespaces below: 1; newest backup: 2023-11-15T22:13:20Z"
    )
    assert texts["keys"].endswith("(vm/101); name the key files with keyfile in the profile")


def test_check_warns_of_what_others_may_read_and_of_an_empty_namespace(
    server: ReferenceServer, user: User
) -> None:
    user.secret.chmod(0o644)
    user.write(of_server(server))
    marks = [(mark, step) for mark, step, _text in steps(env=user.env())]
    assert ("warning", "password") in marks
    user.write(f'[profiles.home]\ndatastore-dir = "{user.home}"\n')
    (user.home / ".chunks").mkdir()
    found = steps(env=user.env())
    assert found[-1][:2] == ("warning", "backups")
    assert "has the role DatastoreReader" in found[-1][2]


@pytest.mark.parametrize(
    ("old", "new", "step", "status", "text"),
    [
        ("[profiles.home]", "[profiles.home", "files", 2, "not valid TOML"),
        ("repository =", "repositry =", "profile", 2, "did you mean repository?"),
        ("fingerprint =", "mount-options = 'rw'\nfingerprint =", "mount", 2, "mounted read-only"),
        ("@127.0.0.1:", "@nowhere.invalid:", "name", 13, "the name 'nowhere.invalid' does not resolve"),
        (":store1", ":store2", "datastore", 16, "'store2'"),
        ("fingerprint =", "ca-file = '/nowhere'\n#", "certificate", 2, "check the path of ca-file"),
        ("fingerprint =", "#", "certificate", 12, "or fingerprint in the profile"),
        ("~/secret", "/nowhere", "password", 2, "No such file or directory; check the name"),
        ('{ file = "~/secret" }', '{ command = "echo wrong" }', "login", 10, "does not accept"),
        ("password =", "keyfile = '/nowhere'\npassword =", "keys", 19, "No such file or directory"),
        ("password =", "namespace = 'none'\npassword =", "backups", 3, "there is no namespace 'none'"),
    ],
)
def test_check_says_at_which_step_it_fails_and_why(
    server: ReferenceServer, user: User, old: str, new: str, step: str, status: int, text: str
) -> None:
    content = of_server(server)
    assert old in content
    user.write(content.replace(old, new))
    *passed, last = steps(env=user.env(), status=status)
    assert {mark for mark, _step, _text in passed} <= {"ok"}
    assert last[:2] == ("FAILED", step)
    assert text in last[2]


def test_check_names_a_server_that_is_unreachable(user: User) -> None:
    with closed_port() as port:
        user.write(f'[profiles.home]\nrepository = "127.0.0.1:{port}:store1"\n')
        assert steps(env=user.env(), status=14)[-1][:2] == ("FAILED", "connection")


def test_check_goes_through_all_profiles(stocked: Stocked, user: User) -> None:
    error_of(pbsfs("config", "check", env=user.env()), 2)
    user.write(f'[profiles.a]\nx = 1\n[profiles.b]\ndatastore-dir = "{stocked.path}"\n')
    found = steps(env=user.env(), status=2)
    assert [(mark, step) for mark, step, _text in found[1:4]] == [
        ("FAILED", "profile"),
        ("ok", "profile"),
        ("ok", "source"),
    ]


def test_show_prints_settings_and_no_secret(server: ReferenceServer, user: User) -> None:
    assert output_of(PBSFS, "config", "show", env=user.env()).startswith("There is no profile; ")
    user.write(of_server(server) + '[profiles.bad]\npassword = "geheim"\n')
    shown = output_of(PBSFS, "config", "show", env=user.env())
    assert "error:         " in shown
    user.write('[profiles.long]\ndatastore-dir = "/d"\ncache-dir = "/c"\ncache-disk-size = "64M"\n')
    shown = output_of(PBSFS, "config", "show", "long", env=user.env())
    assert "\ncache-dir:       /c\ncache-disk-size: 67108864\n" in shown
    user.write(of_server(server) + '[profiles.bad]\npassword = "geheim"\n')
    shown = output_of(PBSFS, "config", "show", env=user.env())
    assert "geheim" not in shown + error_of(pbsfs("config", "show", "bad", env=user.env()), 2)
    facts = json.loads(output_of(PBSFS, "config", "show", "--json", "home", env=user.env()))
    assert facts == {
        "repository": server.repository(TOKEN),
        "password": f"file {user.secret}",
        "fingerprint": server.fingerprint,
        "file": str(user.file),
    }


# --- pbsfs config init

REPOSITORY = (
    "Repository (user@realm!token@host:datastore), the directory of a datastore, or s3://BUCKET/DATASTORE: "
)
KEEP = "ask each time (file, command, ask) [file]: "
REST = [("Namespace (empty for the root namespace): ", ""), ("Key file for encrypted backups", "")]


def test_init_writes_a_profile_that_works(server: ReferenceServer, user: User) -> None:
    answers = [
        (REPOSITORY, "no repository"),
        (REPOSITORY, server.repository(TOKEN)),
        ("Trust it [y/N]: ", "y"),
        (KEEP, "file"),
        (f"secret of {TOKEN}: ", SECRET),
        *REST,
    ]
    status, shown = at_a_terminal([PBSFS, "config", "init"], answers, user.env())
    assert status == 0, shown
    assert "'no repository' is not a repository" in shown
    assert server.fingerprint.upper() in shown.upper()
    assert SECRET not in shown
    secret = user.file.with_name("default.secret")
    for file in (user.file, secret):
        assert file.stat().st_mode & 0o777 == 0o600
    assert SECRET not in user.file.read_text()
    assert sorted(path.name for path in user.file.parent.iterdir()) == ["config.toml", "default.secret"]
    assert output_of(PBSFS, "ls", env=user.env()).split() == ["vm", "ct", "ns", "files"]

    assert "exists in" in at_a_terminal([PBSFS, "config", "init"], [], user.env())[1]
    answers = [*answers[1:3], (KEEP, "command"), ("Command: ", f"cat {secret}"), *REST]
    status, shown = at_a_terminal([PBSFS, "config", "init", "work"], answers, user.env())
    assert status == 0, shown
    assert (user.file.parent / "conf.d" / "work.toml").exists()
    assert output_of(PBSFS, "ls", "work:", env=user.env()).split() == ["vm", "ct", "ns", "files"]


def test_init_replaces_a_file_only_if_the_user_agrees(stocked: Stocked, user: User) -> None:
    user.write("")
    (drop_in := user.file.parent / "conf.d" / "default.toml").parent.mkdir()
    drop_in.write_text("# mine\n")
    answers = [(REPOSITORY, str(stocked.path)), *REST]
    command = [PBSFS, "config", "init"]
    status, _shown = at_a_terminal(command, [*answers, ("Replace it [y/N]: ", "n")], user.env())
    assert (status, drop_in.read_text()) == (130, "# mine\n")
    assert list(drop_in.parent.iterdir()) == [drop_in]
    status, _shown = at_a_terminal(command, [*answers, ("Replace it [y/N]: ", "y")], user.env())
    assert status == 0
    assert output_of(PBSFS, "ls", env=user.env()).split() == ["vm", "ct", "ns", "files"]


def test_init_writes_nothing_for_a_server_that_the_user_does_not_trust(
    server: ReferenceServer, user: User
) -> None:
    answers = [(REPOSITORY, server.repository(TOKEN)), ("Trust it [y/N]: ", "n")]
    status, _shown = at_a_terminal([PBSFS, "config", "init"], answers, user.env())
    assert status == 12
    assert not user.file.exists()
    assert "run it at a terminal" in error_of(pbsfs("config", "init", env=user.env()), 2)
    assert "not the name of a profile" in error_of(pbsfs("config", "init", "a:b", env=user.env()), 2)


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

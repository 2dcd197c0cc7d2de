"""The configuration: which profile names the source, what takes precedence, and what is refused."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pbsfs.access import config
from pbsfs.access.config import (
    MAX_FILE_SIZE,
    check_no_profile,
    configure,
    read_configuration,
    source_of,
    split_profiles,
    with_secrets,
)
from pbsfs.access.options import SourceOptions, resolve
from pbsfs.access.resolve import describe
from pbsfs.base.errors import UsageError
from tests.access.files import Files
from tests.support.needs import need_root

HOME = """
[profiles.home]
repository = "reader@pbs!laptop@pbs.example.com:store1"
fingerprint = "{fingerprint}"
namespace = "prod"
keyfile = "/keys/home.json"
cache-size = "64M"
connections = 3
limit-rate = "5M"
retry-timeout = 7
refresh = 60
mount-options = ["allow_other", "gid=100"]
""".format(fingerprint="ab" * 32)


def directory_profile(name: str, path: str) -> str:
    return f'[profiles.{name}]\ndatastore-dir = "{path}"\n'


# --- what a profile gives


def test_a_profile_gives_all_of_its_settings(files: Files) -> None:
    file = files.write(HOME)
    found = configure(SourceOptions(profile="home"), files.environment)
    assert found.options == SourceOptions(
        repository="reader@pbs!laptop@pbs.example.com:store1",
        fingerprint="ab" * 32,
        namespace="prod",
        keyfiles=(Path("/keys/home.json"),),
        connections=3,
        limit_rate=5 << 20,
        retry_timeout=7.0,
    )
    assert found.profile is not None
    assert (found.profile.cache_size, found.profile.refresh) == ("64M", 60.0)
    assert found.profile.mount_options == ("allow_other", "gid=100")
    assert found.profile.file == file


def test_paths_start_at_the_home_directory_or_are_absolute(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    files.write(directory_profile("home", "~/store"))
    assert files.options(SourceOptions(profile="home")).datastore_dir == Path("/home/anna/store")
    files.write(directory_profile("home", "store"))
    assert files.refused().endswith("'store' is relative; give an absolute path, or start with ~/")


# --- which one names the source


def test_options_name_the_source_without_any_file_being_read(files: Files) -> None:
    files.write("not TOML")
    given = SourceOptions(datastore_dir=Path("/srv/a"))
    assert files.options(given) == given
    assert files.options(PBSFS_DATASTORE_DIR="/srv/a") == SourceOptions()


def test_the_variable_comes_before_the_default_profile(files: Files) -> None:
    files.write(directory_profile("default", "/srv/default") + directory_profile("home", "/srv/home"))
    assert files.options().datastore_dir == Path("/srv/default")
    assert files.options(PBSFS_PROFILE="home").datastore_dir == Path("/srv/home")
    given = SourceOptions(profile="default")
    assert files.options(given, PBSFS_PROFILE="home").datastore_dir == Path("/srv/default")


def test_without_a_default_profile_nothing_names_a_source(files: Files) -> None:
    files.write(HOME)
    assert files.options() == SourceOptions()
    with pytest.raises(UsageError, match="or a profile with --profile or PBSFS_PROFILE"):
        resolve(files.options(), files.environment)


def test_a_source_in_the_environment_comes_before_the_profile_and_says_so(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(HOME)
    assert files.options(PBSFS_PROFILE="home", PBS_REPOSITORY="other:store") == SourceOptions()
    assert "PBSFS_PROFILE=home is not used" in caplog.text
    caplog.clear()


def test_a_profile_and_another_source_exclude_each_other(files: Files) -> None:
    files.write(HOME)
    with pytest.raises(UsageError, match=r"^--profile and --repository exclude each other; give one"):
        files.options(SourceOptions(profile="home", repository="other:store"))


# --- precedence of the settings


def test_options_and_variables_take_precedence_over_the_profile(files: Files) -> None:
    files.write(HOME + 'password = { file = "/secret" }\nkey-password = { file = "/key-secret" }\n')
    given = SourceOptions(profile="home", namespace="dev", keyfiles=(Path("/k"),), retry_timeout=0.0)
    found = files.options(given)
    assert (found.namespace, found.keyfiles, found.retry_timeout) == ("dev", (Path("/k"),), 0.0)
    assert found.password is not None
    assert found.password.words == ("/secret",)
    variables = {
        "PBS_NAMESPACE": "test",
        "PBS_FINGERPRINT": "cd" * 32,
        "PBS_PASSWORD_FILE": "/other",
        "PBS_ENCRYPTION_PASSWORD": "x",
    }
    found = files.options(SourceOptions(profile="home"), **variables)
    assert (found.password, found.key_password) == (None, None)
    resolved = resolve(found, files.environment | variables)
    assert (resolved.namespace, resolved.fingerprint) == ("test", "cd" * 32)


def test_what_is_empty_in_the_environment_is_not_set(files: Files) -> None:
    files.write(HOME + 'password = { file = "/secret" }\n')
    empty = {"PBS_PASSWORD": "", "PBS_NAMESPACE": "", "PBS_REPOSITORY": "", "PBSFS_PROFILE": ""}
    found = configure(SourceOptions(profile="home"), files.environment | empty).options
    assert found.password is not None
    assert found.namespace == "prod"
    assert configure(SourceOptions(), files.environment | empty).options == SourceOptions()


def test_variables_of_another_source_are_not_for_the_profile(files: Files, tmp_path: Path) -> None:
    files.write('[profiles.home]\nrepository = "home.example.com:store1"\n')
    (tmp_path / "proxmox-backup-client.password").write_text("of another server\n")
    others = {
        "PBS_REPOSITORY": "other.example.com:store",
        "PBS_PASSWORD": "of another server",
        "PBS_FINGERPRINT": "cd" * 32,
        "PBS_NAMESPACE": "other",
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }
    found = configure(SourceOptions(profile="home"), files.environment | others)
    resolved = resolve(found.options, found.environment)
    assert resolved.repository == "root@pam@home.example.com:8007:store1"
    assert (resolved.namespace, resolved.fingerprint) == ("", "")
    with pytest.raises(UsageError, match=r"^no password for root@pam at .*: set"):
        describe(resolved, found.environment, None)


@pytest.mark.parametrize("name", ["home", None], ids=["named", "default"])
def test_the_password_of_a_server_without_datastore_is_not_for_the_profile(
    files: Files, name: str | None
) -> None:
    files.write(f'[profiles.{name or "default"}]\nrepository = "home.example.com:store1"\n')
    others = {"PBS_SERVER": "other.example.com", "PBS_AUTH_ID": "me@pbs", "PBS_PASSWORD": "of another server"}
    found = configure(SourceOptions(profile=name), files.environment | others)
    resolved = resolve(found.options, found.environment)
    assert resolved.repository == "root@pam@home.example.com:8007:store1"
    with pytest.raises(UsageError, match=r"^no password for root@pam"):
        describe(resolved, found.environment, None)


# --- the files


def test_the_users_profile_replaces_the_systems(files: Files) -> None:
    files.write(
        directory_profile("home", "/srv/system") + 'cache-size = "64M"\n' + directory_profile("lab", "/lab"),
        system=True,
    )
    files.write(directory_profile("home", "/srv/user"))
    home = read_configuration(files.environment).profile("home")
    assert (home.options.datastore_dir, home.cache_size) == (Path("/srv/user"), None)
    assert files.options(SourceOptions(profile="lab")).datastore_dir == Path("/lab")


def test_drop_ins_add_profiles_and_may_not_repeat_one(files: Files) -> None:
    files.write(directory_profile("a", "/srv/a"))
    files.write(directory_profile("b", "/srv/b"), "conf.d/b.toml")
    files.write("not TOML", "conf.d/b.toml.old")
    found = read_configuration(files.environment)
    assert [name for name in ("a", "b") if name in found] == ["a", "b"]
    file = files.write(directory_profile("a", "/srv/other"), "conf.d/c.toml")
    with pytest.raises(UsageError) as caught:
        read_configuration(files.environment)
    assert str(caught.value) == (
        f"{file}: profile 'a' is in {files.user / 'config.toml'} too; remove one of them"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[profiles.home\n", "not valid TOML: Expected ']'"),
        ("a = " + "[" * 100_000, "not valid TOML: nested too deeply"),
        ("a = " + "9" * 5000, "not valid TOML: "),
        ("#" * (MAX_FILE_SIZE + 1), "larger than 1 MiB; it is not a configuration file"),
        ("[profile.home]\n", "unknown key 'profile'; did you mean profiles?"),
        ("profiles = 1\n", "profiles is not a table"),
    ],
    ids=["syntax", "depth", "digits", "size", "key", "table"],
)
def test_a_file_that_cannot_be_used_is_named(files: Files, text: str, problem: str) -> None:
    file = files.write(text)
    assert files.refused().startswith(f"{file}: {problem}")


def test_a_file_that_is_not_text_or_no_file_is_refused(files: Files) -> None:
    file = files.write("")
    file.write_bytes(b"\xff")
    assert "not UTF-8 text" in files.refused()
    file.unlink()
    os.mkfifo(file)
    assert files.refused() == f"{file}: not a regular file; remove it"


def test_a_directory_of_files_that_is_closed_to_its_user_is_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, system = (files.write(HOME, "conf.d/home.toml", system=system).parent for system in (False, True))

    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert files.refused() == f"{users}: Permission denied; make it readable with chmod u+rx"
    files.environment = {"XDG_CONFIG_HOME": "/nonexistent"}
    monkeypatch.setattr(config, "directories", lambda _environment: [files.system])
    assert read_configuration(files.environment).skipped == (system,)


def test_a_file_that_others_control_is_refused(files: Files) -> None:
    need_root("chown")
    file = files.write(HOME)
    file.chmod(0o666)
    assert files.refused() == f"{file}: every user of this machine may write it; run chmod o-w on it"
    file.chmod(0o600)
    os.chown(file, 12345, -1)
    assert files.refused() == f"{file}: belongs to another user; change that with chown, or remove it"


@pytest.mark.parametrize("key", ["password", "key-password"])
def test_a_file_that_a_group_can_write_names_no_commands(files: Files, key: str) -> None:
    file = files.write(HOME + f'{key} = {{ command = ["print-it"] }}\n')
    file.chmod(0o660)
    said = "names a command, and a group can write the file; run chmod g-w on it"
    assert files.refused("home") == f"{file}: profiles.home {said}"
    file.chmod(0o640)
    assert configure(SourceOptions(profile="home"), files.environment).profile
    files.write(HOME).chmod(0o660)
    assert configure(SourceOptions(profile="home"), files.environment).profile


def test_an_unknown_profile_is_refused_with_a_suggestion(files: Files) -> None:
    assert files.refused("home").endswith("pbsfs config init writes a first profile")
    files.write(HOME)
    assert files.refused("hoem") == "profile 'hoem': not in the configuration; did you mean home?"
    assert files.refused("x").endswith("; use home")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('fingerprnt = "x"', ": unknown key 'fingerprnt'; did you mean fingerprint?"),
        ('token-secret = "geheim"', ": unknown key 'token-secret'; did you mean password?"),
        ("zzz = 1", ": unknown key 'zzz'; use repository, datastore-dir, "),
        ("namespace = 1", '.namespace: not text; put it in quotes: "…"'),
        ('namespace = "a b"', ".namespace: "),
        ('fingerprint = "ab"', ".fingerprint: 'ab' is not a fingerprint"),
        ('cache-size = "1M"', ".cache-size: a cache of 1M is too small"),
        ("connections = 17", ".connections: not a number of connections; give one from 1 to 16"),
        ('limit-rate = "0"', ".limit-rate: a rate of 0 is too small"),
        ("limit-rate = 5", ".limit-rate: not text"),
        ("connections = true", ".connections: not a number of connections"),
        ("retry-timeout = nan", ".retry-timeout: not a number of seconds"),
        ("retry-timeout = 0x" + "f" * 6000, ".retry-timeout: not a number of seconds"),
        ("mount-options = [1]", ".mount-options: not text"),
        ('log-format = "xml"', ".log-format: log format 'xml': unknown; use text or json"),
        (f"keyfile = {['/k'] * 101}", ".keyfile: 101 entries are too many; 100 is the most"),
        ('datastore-dir = "/srv"', ": repository and datastore-dir exclude each other"),
        (
            f'ca-file = "/ca.pem"\nfingerprint = "{"ab" * 32}"',
            ": fingerprint and ca-file exclude each other",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(files: Files, line: str, problem: str) -> None:
    file = files.write(f'[profiles.home]\nrepository = "host:store"\n{line}\n')
    assert files.refused().startswith(f"{file}: profiles.home{problem}")


def test_a_profile_that_is_not_valid_does_not_hinder_others(files: Files) -> None:
    files.write('[profiles.bad]\n[profiles.worse]\nrepository = "a b"\n' + directory_profile("home", "/srv"))
    assert files.options(SourceOptions(profile="home")).datastore_dir == Path("/srv")
    assert files.refused("bad").endswith(
        "profiles.bad: names no source; give repository, datastore-dir or bucket"
    )
    assert "profiles.worse.repository: 'a b' is not a repository" in files.refused("worse")


# --- secrets


@pytest.mark.parametrize("key", ["password", "key-password"])
def test_a_secret_in_the_file_is_refused_without_showing_it(files: Files, key: str) -> None:
    file = files.write(f'[profiles.home]\nrepository = "host:store"\n{key} = "geheim"\n')
    text = files.refused()
    assert text.startswith(f"{file}: profiles.home.{key}: a secret does not belong in this file; ")
    assert '{ file = "PATH" }' in text
    assert "geheim" not in text


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        '{ fil = "geheim" }',
        '{ file = "/geheim", command = "geheim" }',
        '{ file = "" }',
        '{ file = "geheim" }',
        '{ file = "~geheim" }',
        '{ credential = "geheim geheim" }',
        '{ file = "/x", user = "geheim" }',
        "{ command = [] }",
        "{ command = [1] }",
        """{ command = "geheim '" }""",
        '{ keyring = "pbs", user = 1 }',
    ],
)
def test_what_is_not_a_reference_is_refused_without_showing_it(files: Files, value: str) -> None:
    files.write(f'[profiles.home]\nrepository = "host:store"\npassword = {value}\n')
    text = files.refused()
    assert "profiles.home.password: " in text
    assert "geheim" not in text


def secret(files: Files, reference: str, **environment: str) -> str:
    """What pbsfs finds as the password of a profile with this reference."""
    files.write(f'[profiles.home]\nrepository = "h:s"\nfingerprint = "{"ab" * 32}"\npassword = {reference}\n')
    found = configure(SourceOptions(profile="home"), files.environment | environment)
    access = describe(resolve(found.options, found.environment), found.environment, None).access
    assert "geheim" not in repr(access)
    dumped: dict[str, Any] = access.dump()
    return str(dumped["secret"])


def test_a_secret_comes_from_a_file_command_or_credential(files: Files, tmp_path: Path) -> None:
    (file := tmp_path / "secret").write_text("geheim\nnot this\n")
    file.chmod(0o600)
    assert secret(files, f'{{ file = "{file}" }}') == "geheim"
    assert secret(files, '{ command = ["printf", "%s\\n", "a b"] }') == "a b"
    assert secret(files, """{ command = "printf 'a b'" }""") == "a b"
    assert secret(files, '{ credential = "secret" }', CREDENTIALS_DIRECTORY=str(tmp_path)) == "geheim"


def test_a_file_that_others_may_read_causes_a_warning(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file := tmp_path / "secret").write_text("geheim\n")
    file.chmod(0o644)
    assert secret(files, f'{{ file = "{file}" }}') == "geheim"
    assert f"every user of this machine may read file {file}; run chmod o-r" in caplog.text
    caplog.clear()
    file.chmod(0o640)
    assert secret(files, f'{{ file = "{file}" }}') == "geheim"
    assert not caplog.text


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ('{ file = "/nowhere" }', "file /nowhere: No such file or directory; check the name"),
        ('{ file = "/dev/null" }', "file /dev/null: its first line is empty; put the secret there"),
        (
            '{ command = ["sh", "-c", "echo geheim; exit 3"] }',
            "command sh: it ended with status 3; run it in a shell to see why",
        ),
        ('{ command = "nothing-such" }', "command nothing-such: No such file or directory"),
        ('{ command = ["printf", "\\\\377"] }', "command printf: its first line is not UTF-8 text"),
        ('{ credential = "x" }', "credential $CREDENTIALS_DIRECTORY/x: No such file or directory"),
    ],
)
def test_a_place_that_gives_no_secret_is_named(files: Files, reference: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        secret(files, reference)
    assert f"profiles.home.password: {problem}" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_secret_comes_from_the_keyring(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {("pbs", "laptop"): "geheim", ("pbs", "home"): "of the profile"}
    library = types.SimpleNamespace(get_password=lambda service, user: held.get((service, user)))
    monkeypatch.setitem(sys.modules, "keyring", library)
    assert secret(files, '{ keyring = "pbs", user = "laptop" }') == "geheim"
    assert secret(files, '{ keyring = "pbs" }') == "of the profile"
    with pytest.raises(UsageError, match=r"holds nothing for 'me'; store it with: keyring set pbs me$"):
        secret(files, '{ keyring = "pbs", user = "me" }')

    def locked(_service: str, _user: str) -> str:
        raise RuntimeError("locked\nby the user")

    monkeypatch.setattr(library, "get_password", locked)
    with pytest.raises(UsageError, match=r"not available \(RuntimeError: locked by the user\); unlock it"):
        secret(files, '{ keyring = "pbs" }')
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(UsageError, match="keyring is not installed; install it"):
        secret(files, '{ keyring = "pbs" }')


def test_a_command_does_not_inherit_other_secrets(files: Files) -> None:
    command = """{ command = "sh -c 'env | xargs'" }"""
    found = secret(files, command, PATH=os.environ["PATH"], PBS_ENCRYPTION_PASSWORD="x", MORE="y")
    assert "MORE=y" in found
    assert "PBS_ENCRYPTION_PASSWORD" not in found


def test_a_mounts_source_gets_the_secrets_of_its_profile(files: Files) -> None:
    files.write(
        "[profiles.bad]\n" + directory_profile("dir", "/srv") + HOME + 'password = { file = "/secret" }\n'
    )
    mount = SourceOptions(repository="reader@pbs!laptop@pbs.example.com:8007:store1", namespace="")
    found = with_secrets(mount, files.environment)
    assert found.password is not None
    assert (found.repository, found.namespace, found.fingerprint) == (mount.repository, "", "ab" * 32)
    assert found.keyfiles == (Path("/keys/home.json"),)
    assert with_secrets(mount, files.environment | {"PBS_PASSWORD": "x"}).password is None
    other = SourceOptions(repository="reader@pbs!laptop@other.example.com:8007:store1", namespace="")
    assert with_secrets(other, files.environment) == other


def test_a_ca_file_counts_instead_of_the_systems(files: Files, tmp_path: Path) -> None:
    (ca := tmp_path / "ca.pem").write_text("not a certificate")
    files.write(
        f'[profiles.home]\nrepository = "h:s"\nca-file = "{ca}"\npassword = {{ command = "echo x" }}\n'
    )
    found = configure(SourceOptions(profile="home"), files.environment)
    with pytest.raises(UsageError, match="not a certificate; give a file in PEM format"):
        describe(resolve(found.options, found.environment), found.environment, None)


# --- NAME:PATH


def test_a_name_before_a_colon_is_a_profile_only_if_there_is_one(files: Files) -> None:
    files.write(HOME)
    texts = ["home:vm/100/latest", "home:", "other:vm", "vm/100/2024-11-07T17:20:00Z", "./home:", "home"]
    assert split_profiles(texts, files.environment) == [
        ("home", "vm/100/latest"),
        ("home", ""),
        None,
        None,
        None,
        None,
    ]


def test_a_place_that_starts_with_the_name_of_no_profile_is_refused(files: Files) -> None:
    files.write(HOME)
    check_no_profile(["vm/100/2024-11-07T17:20:00Z", "./a:b", ""], files.environment)
    with pytest.raises(UsageError, match="'hoem': not in the configuration; did you mean home"):
        check_no_profile(["vm/100", "hoem:vm"], files.environment)


def test_no_file_is_read_for_a_path_without_such_a_name(files: Files) -> None:
    files.write("not TOML")
    assert split_profiles(["vm/100/2024-11-07T17:20:00Z", "", "-"], files.environment) == [None] * 3


@pytest.mark.parametrize(
    ("text", "options", "path"),
    [
        ("home:", SourceOptions(profile="home"), ""),
        ("home:files/host/web1/", SourceOptions(profile="home"), "files/host/web1"),
        ("none:", SourceOptions(profile="none"), ""),
        ("store1", SourceOptions(repository="store1"), ""),
        ("store1/host/web1", SourceOptions(repository="store1"), "host/web1"),
        ("localhost:host/vm/100", SourceOptions(repository="localhost:host"), "vm/100"),
        ("host", SourceOptions(repository="host"), ""),
        ("host:store", SourceOptions(repository="host:store"), ""),
        ("u@pbs!t@host:1:s/vm/100", SourceOptions(repository="u@pbs!t@host:1:s"), "vm/100"),
        ("/srv/store1", SourceOptions(datastore_dir=Path("/srv/store1")), ""),
        ("/srv/store1:ns/a", SourceOptions(datastore_dir=Path("/srv/store1")), "ns/a"),
        ("./store1", SourceOptions(datastore_dir=Path("store1")), ""),
    ],
)
def test_a_source_is_a_profile_repository_or_directory(
    files: Files, text: str, options: SourceOptions, path: str
) -> None:
    files.write(HOME)
    assert source_of(text, files.environment) == (options, path)


@pytest.mark.parametrize("text", ["host/web1/latest", "files/vm/100/latest/guest", "ns/prod", "vm/100/"])
def test_a_path_is_not_taken_for_a_datastore_of_this_computer(files: Files, text: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' is a path in a source.*; write NAME:{text} .*--subtree"):
        source_of(text, files.environment)


def test_a_profile_without_its_colon_is_not_taken_for_a_datastore(files: Files) -> None:
    files.write(HOME)
    with pytest.raises(UsageError, match="write home: for the profile, or localhost:home for the datastore"):
        source_of("home", files.environment)


def test_a_directory_may_have_a_colon(files: Files, tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert source_of(f"{tmp_path}/a:b", files.environment)[0].datastore_dir == tmp_path / "a:b"
    with pytest.raises(UsageError, match=r"^the source is empty"):
        source_of("", files.environment)

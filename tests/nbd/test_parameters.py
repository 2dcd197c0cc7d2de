"""The plugin's parameters: what each of them says, and what is wrong about some."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pbsfs.access.caching import CacheAccess
from pbsfs.access.description import BucketAccess, Description, DirectoryAccess, ServerAccess
from pbsfs.access.keyring import KeyRing
from pbsfs.base.errors import KeyFileError, UsageError
from pbsfs.base.names import Namespace
from pbsfs.formats.keys import Key
from pbsfs.nbd.parameters import PARAMETERS, Parameters, Settings, filters_of
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE
from pbsfs.sources.bucket.address import BucketAddress
from tests.support import made
from tests.support.keyfiles import key_file

PASSWORD = 'geh€im: p"a%s'
REPOSITORY = "reader@pbs!laptop@pbs.example.com:store1"
CANONICAL = "reader@pbs!laptop@pbs.example.com:8007:store1"
FINGERPRINT = ":".join(["EE", "2f"] * 16)
SERVER = {"PBS_REPOSITORY": REPOSITORY, "PBS_FINGERPRINT": FINGERPRINT}
DIRECTORY = "datastore_dir=/srv/datastore"

Tells = Callable[..., Settings]


@pytest.fixture
def told(tmp_path: Path) -> Tells:
    """What words say, in an environment that is empty but for what a test puts there."""

    def tell(*words: str, **environment: str) -> Settings:
        parameters = Parameters({"HOME": str(tmp_path), **environment}, ["nbdkit", "--filter", "cow"])
        for word in words:
            key, _equals, value = word.partition("=")
            parameters.take(key, value)
        return parameters.settings()

    return tell


def server_of(settings: Settings) -> ServerAccess:
    assert isinstance(settings.source.access, ServerAccess)
    return settings.source.access


def directory_of(settings: Settings) -> Path:
    assert isinstance(settings.source.access, DirectoryAccess)
    return settings.source.access.path


def password_of(settings: Settings) -> str:
    return server_of(settings).secret.reveal()


# --- what each of them says


def test_a_directory_is_enough(told: Tells) -> None:
    settings = told(DIRECTORY)
    assert directory_of(settings) == Path("/srv/datastore")
    assert (settings.path, settings.missing) == ("", None)
    assert settings.source.namespace == Namespace(())
    assert settings.cache_size == DEFAULT_CACHE_SIZE
    assert settings.zeroed is None
    assert settings.ready_fd is None
    assert settings.filters == {"cow"}
    assert list(settings.source.keys) == []


def test_a_profile_names_the_source_with_its_password_and_keys(told: Tells, tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text(f"{PASSWORD}\n")
    secret.chmod(0o600)
    (file := tmp_path / ".config" / "pbsfs" / "config.toml").parent.mkdir(parents=True)
    file.write_text(
        f'[profiles.home]\nrepository = "{REPOSITORY}"\nfingerprint = "{FINGERPRINT}"\n'
        f'namespace = "prod"\ncache-size = "64M"\npassword = {{ file = "{secret}" }}\n'
    )
    for settings in (told("profile=home"), told(PBSFS_PROFILE="home")):
        assert str(server_of(settings).repository) == CANONICAL
        assert password_of(settings) == PASSWORD
        assert settings.source.namespace == Namespace(("prod",))
        assert settings.cache_size == 64 << 20
    assert told("profile=home", "cache_size=128M").cache_size == 128 << 20
    with pytest.raises(UsageError, match=r"^profile= and repo(sitory)?= exclude each other"):
        told("profile=home", f"repo={REPOSITORY}")


def test_a_bucket_with_all_that_belongs_to_it(told: Tells, tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": PASSWORD.replace("€", "")}
    words = ["bucket=s3://backups/store1", "endpoint=https://s3:9000", "region=garage", "path_style=false"]
    access = told(*words, f"fingerprint={FINGERPRINT}", **keys).source.access
    assert isinstance(access, BucketAccess)
    assert access.address == BucketAddress("backups", "store1", "https://s3:9000", "garage", False)
    assert str(access.key) == "AKIDEXAMPLE of the environment"
    assert access.trust.pinned == FINGERPRINT.replace(":", "").lower()
    access = told("anonymous=true", PBSFS_BUCKET="s3://backups/store1").source.access
    assert isinstance(access, BucketAccess)
    assert access.key.kind == "none"
    for words, said in (
        (["bucket=s3://backups/s", "aws_profile=ci"], "AWS profile 'ci': neither in"),
        (["bucket=s3://backups/s", f"s3_config={tmp_path}/s3.cfg"], "s3.cfg: No such file"),
        (["bucket=s3://backups/s", f"ca_file={tmp_path}/ca"], "ca: No such file"),
        (["bucket=s3://backups/s", "path_style=yes"], "path_style=yes: unknown; use true or false"),
        (["region=x", DIRECTORY], "region= is for a bucket; leave it out, or give bucket="),
    ):
        with pytest.raises(UsageError) as caught:
            told(*words, **keys)
        assert said in str(caught.value)


def test_a_directory_stays_where_it_is_when_the_working_directory_is_another(
    told: Tells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert directory_of(told("datastore_dir=here")) == tmp_path / "here"


def test_a_server_with_all_that_belongs_to_it(told: Tells, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{PASSWORD}\nmore\n")
    settings = told(
        f"repo={REPOSITORY}",
        f"password=+{tmp_path}/secret",
        f"fingerprint={FINGERPRINT}",
        "namespace=prod/db",
        "connections=4",
        "limit_rate=5M",
        "nbd_connections=7",
        "retry_timeout=2.5",
    )
    assert str(server_of(settings).repository) == CANONICAL
    assert server_of(settings).trust.pinned == FINGERPRINT.replace(":", "").lower()
    assert settings.source.namespace == Namespace(("prod", "db"))
    assert (server_of(settings).connections, server_of(settings).retry_timeout) == (4, 2.5)
    assert settings.source.limit_rate == 5 << 20
    assert settings.nbd_connections == 7
    assert password_of(settings) == PASSWORD


def test_a_cache_on_disk(told: Tells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = (f"repo={REPOSITORY}", "fingerprint=" + FINGERPRINT)
    cache = told(*server, "cache_dir=c", "cache_disk_size=2G", PBS_PASSWORD=PASSWORD).source.cache
    assert cache == CacheAccess(tmp_path / "c", 2 << 30)
    variables = {"PBSFS_CACHE_DIR": "/c", "PBSFS_CACHE_DISK_SIZE": "1G"}
    cache = told(*server, "offline=true", **variables).source.cache
    assert cache == CacheAccess(Path("/c"), 1 << 30, offline=True)
    assert told(DIRECTORY, **variables).source.cache is None
    assert told(DIRECTORY, "cache_dir=c", **variables).source.cache == CacheAccess(tmp_path / "c", 50 << 30)
    for word, error in (
        ("offline=yes", "offline=yes: unknown; use true or false"),
        ("offline=true", "offline=: no cache on disk is named; name it with cache_dir= or PBSFS_CACHE_DIR"),
        ("cache_dir=", "cache_dir=: empty; give a directory"),
        ("cache_disk_size=1", "a cache on disk of 1 is too small; the least is 64M"),
    ):
        with pytest.raises(UsageError, match=re.escape(error)):
            told(*server, word, PBS_PASSWORD=PASSWORD)


def test_a_server_is_named_part_by_part(told: Tells) -> None:
    words = ("server=fd00::1", "port=8443", "datastore=store2", "auth_id=reader@pbs!laptop", "namespace=")
    settings = told(*words, PBS_PASSWORD=PASSWORD, PBS_NAMESPACE="prod", PBS_SERVER="other")
    assert str(server_of(settings).repository) == "reader@pbs!laptop@[fd00::1]:8443:store2"
    assert settings.source.namespace == Namespace(())
    settings = told("datastore=store2", PBS_PASSWORD=PASSWORD, PBS_NAMESPACE="prod", PBS_SERVER="other")
    assert str(server_of(settings).repository) == "root@pam@other:8007:store2"
    assert settings.source.namespace == Namespace(("prod",))
    with pytest.raises(UsageError, match="repo= and server= exclude each other"):
        told("server=host", f"repo={REPOSITORY}")
    with pytest.raises(UsageError, match="name it with datastore= or PBS_DATASTORE"):
        told("server=host")


def test_the_environment_names_a_directory(told: Tells) -> None:
    settings = told(PBSFS_DATASTORE_DIR="/usr", PBS_REPOSITORY=REPOSITORY)
    assert directory_of(settings) == Path("/usr")


def test_names_may_have_hyphens(told: Tells) -> None:
    settings = told("datastore-dir=/x", "cache-size=64M", "retry-timeout=1", "on-damage=zero")
    assert directory_of(settings) == Path("/x")
    assert settings.cache_size == 64 << 20
    assert settings.zeroed is not None


@pytest.mark.parametrize(
    ("words", "path", "missing"),
    [
        ("", "", None),
        ("type=ct", "ct", None),
        ("type=host id=web1", "host/web1", None),
        ("vmid=100", "vm/100", None),
        ("type=vm vmid=100", "vm/100", None),
        ("vmid=100 timestamp=latest", "vm/100/latest", None),
        ("vmid=100 timestamp=latest image=a.img", "vm/100/latest/a.img", None),
        (
            "image=a.img timestamp=2023-11-14T22:13:20Z id=100 type=vm",
            "vm/100/2023-11-14T22:13:20Z/a.img",
            None,
        ),
        ("path=/vm/100/latest/a.img", "vm/100/latest/a.img", None),
        ("path=ns/prod/vm/100/", "ns/prod/vm/100", None),
        ("path= vmid=7", "vm/7", None),
        ("vmid=100 image=a.img", "vm/100", "timestamp"),
        ("type=vm timestamp=latest", "vm", "id"),
        ("type=vm image=a.img", "vm", "id"),
        ("vmid=100 timestamp= image=", "vm/100", None),
        ("namespace= vmid=100", "vm/100", None),
    ],
)
def test_words_come_to_a_place_in_the_tree(told: Tells, words: str, path: str, missing: str | None) -> None:
    settings = told(DIRECTORY, *words.split())
    assert (settings.path, settings.missing) == (path, missing)
    assert settings.source.namespace == Namespace(())


def test_key_files_may_be_several(told: Tells, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_bytes(key_file())
    (tmp_path / "two.json").write_bytes(key_file(key=bytes(range(1, 33))))
    settings = told(DIRECTORY, f"keyfile={tmp_path}/one.json", f"keyfile={tmp_path}/two.json")
    assert set(settings.source.keys) == {made.KEY.fingerprint, made.OTHER_KEY.fingerprint}


def test_a_source_may_be_handed_over(told: Tells) -> None:
    description = Description(
        DirectoryAccess(Path("/srv/other")), Namespace(("prod",)), KeyRing([Key(bytes(range(32)))])
    )
    with description.handed_over() as fd:
        settings = told(f"source_fd={os.dup(fd)}", "ready_fd=7", **SERVER)
    assert directory_of(settings) == Path("/srv/other")
    assert settings.source.namespace == Namespace(("prod",))
    assert set(settings.source.keys) == {made.KEY.fingerprint}
    assert settings.ready_fd == 7


def test_sizes_and_damage(told: Tells) -> None:
    settings = told(DIRECTORY, "cache_size=64M", "on_damage=zero")
    assert settings.cache_size == 64 << 20
    assert settings.zeroed is not None
    assert told(DIRECTORY, "on_damage=fail").zeroed is None


def test_an_empty_parameter_says_nothing(told: Tells) -> None:
    words = ("namespace=", "fingerprint=", "retry_timeout=", "connections=", "repo=", "path=", "id=", "type=")
    settings = told(DIRECTORY, *words)
    assert settings.path == ""
    assert directory_of(settings) == Path("/srv/datastore")
    of_server = server_of(told(*words, **SERVER, PBS_PASSWORD=PASSWORD))
    assert of_server.trust.pinned == FINGERPRINT.replace(":", "").lower()
    assert (of_server.retry_timeout, of_server.connections) == (None, None)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nbdkit python x", set()),
        ("nbdkit --filter=cow python x", {"cow"}),
        ("nbdkit --filter cow --filter=cache python x", {"cow", "cache"}),
        ("nbdkit --filter=/usr/lib/nbdkit/filters/nbdkit-cow-filter.so python x", {"cow"}),
        ("nbdkit --filt=cacheextents --fil tar python x", {"cacheextents", "tar"}),
        ("nbdkit --filter", {""}),
    ],
)
def test_filters_are_found_on_the_command_line(line: str, found: set[str]) -> None:
    assert filters_of(line.split()) == found


# --- passwords


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nanother line\n"])
def test_a_password_is_the_first_line_of_a_file(told: Tells, tmp_path: Path, end: str) -> None:
    (tmp_path / "secret").write_bytes(f"{PASSWORD}{end}".encode())
    assert password_of(told(f"password=+{tmp_path}/secret", **SERVER)) == PASSWORD


def test_a_password_comes_over_a_descriptor(told: Tells) -> None:
    reading, writing = os.pipe()
    os.write(writing, f"{PASSWORD}\n".encode())
    os.close(writing)
    assert password_of(told(f"password=-{reading}", **SERVER)) == PASSWORD
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)


def test_a_plain_password_is_taken_with_a_warning(told: Tells, caplog: pytest.LogCaptureFixture) -> None:
    assert password_of(told(f"password={PASSWORD}", **SERVER)) == PASSWORD
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "can be read by every user" in record.getMessage()
    assert PASSWORD not in record.getMessage()
    caplog.clear()


@pytest.mark.parametrize("form", ["", "_FILE", "_FD", "_CMD"])
def test_a_password_comes_from_the_environment(told: Tells, tmp_path: Path, form: str) -> None:
    (tmp_path / "secret").write_text(f"{PASSWORD}\n")
    fd = os.open(tmp_path / "secret", os.O_RDONLY)
    values = {"": PASSWORD, "_FILE": f"{tmp_path}/secret", "_FD": str(fd), "_CMD": f"cat {tmp_path}/secret"}
    settings = told(**SERVER, **{f"PBS_PASSWORD{form}": values[form]})
    assert password_of(settings) == PASSWORD
    if form != "_FD":  # which was read, and closed
        os.close(fd)


def test_a_password_comes_from_systemd(told: Tells, tmp_path: Path) -> None:
    (tmp_path / "proxmox-backup-client.password").write_text(PASSWORD)
    assert password_of(told(**SERVER, CREDENTIALS_DIRECTORY=str(tmp_path))) == PASSWORD


def test_the_parameter_goes_before_the_environment(told: Tells, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(PASSWORD)
    settings = told(
        f"password=+{tmp_path}/secret",
        "repo=other@pbs@host:store2",
        **SERVER,
        PBS_PASSWORD="another",
        PBS_PASSWORD_FILE="/nowhere",
    )
    assert password_of(settings) == PASSWORD
    assert str(server_of(settings).repository) == "other@pbs@host:8007:store2"


@pytest.mark.parametrize("wrong", ["vmid=1 id=2", "cache_size=x", "on_damage=x", "fingerprint=x", "x=x"])
def test_a_password_shows_itself_nowhere(
    told: Tells, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    (tmp_path / "secret").write_text(PASSWORD)
    given = f"password=+{tmp_path}/secret"
    parameters = Parameters({"HOME": str(tmp_path), **SERVER})
    parameters.take("password", PASSWORD)
    settings = told(given, **SERVER)
    with pytest.raises(UsageError) as caught:
        told(given, *wrong.split(), **SERVER)
    shown = [repr(vars(parameters)), repr(settings), str(settings), repr(caught.value), caplog.text]
    assert not [text for text in shown if PASSWORD in text or repr(PASSWORD)[1:-1] in text]
    caplog.clear()


# --- what is wrong


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("nonsense=1", "parameter 'nonsense': unknown; use profile, repo, server, "),
        ("Image=x", "parameter 'Image': unknown"),
        ("vmid=1 vmid=1", "vmid=: given twice; give it once"),
        ("cache_size=64M cache-size=64M", "cache-size=: given twice"),
        ("vmid=1 id=2", "vmid= is short for type=vm id="),
        ("vmid=1 type=ct", "vmid= is short for type=vm id="),
        ("path=vm/1 vmid=1 image=x", "leave out vmid=, image="),
        ("path=vm timestamp=latest", "leave out timestamp="),
        ("type=vms", "type=vms: unknown; use vm, ct, host"),
        ("image=x", "group: not named; give vmid=, or type= and id=, or path="),
        ("id=100", "group: not named; give vmid="),
        ("timestamp=latest", "group: not named; give vmid="),
        ("vmid=1/2", "id=1/2: contains a slash; use path="),
        ("vmid=1 timestamp=x image=a/b", "image=a/b: contains a slash"),
        ("keyfile=", "keyfile=: empty; give"),
        ("cache_size=", "'' is not a size"),
        ("cache_size=much", "'much' is not a size"),
        ("cache_size=1M", "too small; the least is 32M"),
        ("connections=0", "connections=0: not a number from 1 to 16"),
        ("limit_rate=0", "a rate of 0 is too small"),
        ("limit_rate=", "'' is not a size"),
        ("connections=17", "connections=17: not a number"),
        ("connections=2.5", "connections=2.5: not a whole number"),
        ("nbd_connections=0", "nbd_connections=0: not a number from 1 to 10000"),
        ("connections=some", "connections=some: not a number"),
        ("retry_timeout=-1", "retry_timeout=-1: not a number from 0 to 1e\\+09"),
        ("retry_timeout=nan", "retry_timeout=nan: not a number"),
        ("retry_timeout=inf", "retry_timeout=inf: not a number"),
        ("on_damage=skip", "on_damage=skip: unknown; use fail or zero"),
        ("on_damage=", "on_damage=: unknown; use fail or zero"),
        ("log-format=xml", "log format 'xml': unknown; use text or json"),
        (f"repo={REPOSITORY}", "repo= and datastore_dir= exclude each other"),
        ("namespace=a//b", "is not the name of a namespace"),
        ("namespace=../b", r"'\.\.' is not the name of a namespace"),
    ],
)
def test_what_is_wrong_is_named(told: Tells, words: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        told(DIRECTORY, *words.split())


def test_metrics_are_served_where_a_parameter_says(told: Tells) -> None:
    assert told(DIRECTORY).metrics is None
    assert str(told(DIRECTORY, "metrics=127.0.0.1:9100").metrics) == "127.0.0.1:9100"
    with pytest.raises(UsageError):
        told(DIRECTORY, "metrics=192.0.2.1:9100")


def test_the_format_of_the_log_is_a_parameter_or_a_variable(told: Tells, tmp_path: Path) -> None:
    assert told(DIRECTORY).log_format is None
    assert told(DIRECTORY, PBSFS_LOG_FORMAT="json").log_format == "json"
    assert told(DIRECTORY, "log-format=text", PBSFS_LOG_FORMAT="json").log_format == "text"
    with pytest.raises(UsageError, match="unknown; use text or json"):
        told(DIRECTORY, PBSFS_LOG_FORMAT="JSON")
    (tmp_path / "pbsfs").mkdir()
    (tmp_path / "pbsfs" / "config.toml").write_text(
        '[profiles.home]\ndatastore-dir = "/srv/datastore"\nlog-format = "json"\n'
    )
    found = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert told("profile=home", **found).log_format == "json"
    assert told("profile=home", "log_format=text", **found).log_format == "text"


def test_no_directory_at_all_is_one(told: Tells) -> None:
    with pytest.raises(UsageError, match="datastore_dir=: empty; give"):
        told("datastore_dir=")


def test_without_a_source_it_is_said_how_to_name_one(told: Tells) -> None:
    with pytest.raises(UsageError, match=r"repo= or PBS_REPOSITORY, a .* datastore_dir= or PBSFS_"):
        told("vmid=100")


@pytest.mark.parametrize("words", ["", "password="])
def test_without_a_password_it_is_said_how_to_give_one(told: Tells, words: str) -> None:
    with pytest.raises(UsageError, match=r"no password.*PBS_PASSWORD"):
        told(*words.split(), **SERVER)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("+/nowhere/secret", "cannot read /nowhere/secret: No such file or directory"),
        ("+/", "cannot read /: Is a directory"),
        ("-2", "not the number of a descriptor; give one from 3 on"),
        ("-x", "not the number of a descriptor; give one from 3 on"),
        ("-999999", "cannot read descriptor 999999: Bad file descriptor"),
    ],
)
def test_a_password_that_cannot_be_read_is_an_error_that_names_the_place(
    told: Tells, value: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        told(f"password={value}", **SERVER)


def test_a_password_that_is_no_text_is_an_error_without_it(told: Tells, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"caf\xe9 secret\n")
    with pytest.raises(UsageError, match="is not UTF-8 text") as caught:
        told(f"password=+{tmp_path}/secret", **SERVER)
    assert "caf" not in str(caught.value)


def test_a_repository_or_fingerprint_that_is_none_is_an_error(told: Tells) -> None:
    with pytest.raises(UsageError, match="fingerprint"):
        told("fingerprint=12:34", PBS_REPOSITORY=REPOSITORY, PBS_PASSWORD=PASSWORD)
    with pytest.raises(UsageError):
        told("repo=::", PBS_PASSWORD=PASSWORD)


def test_a_key_file_that_is_not_there_is_an_error_that_names_it(told: Tells) -> None:
    with pytest.raises(KeyFileError, match=r"/nowhere/key\.json: No such file"):
        told(DIRECTORY, "keyfile=/nowhere/key.json")


def test_every_parameter_is_looked_at_here() -> None:
    """A new one has to come into these tests too."""
    text = Path(__file__).read_text()
    assert [name for name in PARAMETERS if f"{name}=" not in text] == []

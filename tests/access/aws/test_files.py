"""The files of AWS's tools: what a profile has there, and what is said about files that make no sense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.access.aws import files
from pbsfs.access.aws.files import read_profile
from pbsfs.base.errors import UsageError

CREDENTIALS = """\
# a comment
[default]
aws_access_key_id = AKIADEFAULT
aws_secret_access_key = a=b:c/d+e

[ci]
aws_access_key_id=AKIACI
"""

CONFIG = """\
[default]
region = eu-central-1

[profile ci]
region = eu-west-1
services = local
s3 =
    addressing_style = path
    max_queue_size=10

[profile "with space"]
region = us-west-2

[services local]
s3 =
  endpoint_url = https://minio.example.com
dynamodb =
  endpoint_url = https://other.example.com

[sso-session x]
sso_region = y
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws/credentials").chmod(0o600)
    (tmp_path / ".aws/config").write_text(CONFIG)
    return tmp_path


def test_the_default_profile_is_in_both_files(home: Path) -> None:
    found = read_profile(None, {"HOME": str(home)})
    assert (found.name, found.is_named) == ("default", False)
    assert found.credentials.profile("default") == {
        "aws_access_key_id": "AKIADEFAULT",
        "aws_secret_access_key": "a=b:c/d+e",
    }
    assert found.setting("region") == "eu-central-1"
    assert found.setting("nothing") is None
    assert found.services == {}


def test_a_variable_or_an_option_names_another_profile(home: Path) -> None:
    by_variable = read_profile(None, {"HOME": str(home), "AWS_PROFILE": "ci"})
    assert (by_variable.name, by_variable.is_named) == ("ci", False)
    assert by_variable.setting("region") == "eu-west-1"
    assert read_profile(None, {"HOME": str(home), "AWS_DEFAULT_PROFILE": "ci"}).name == "ci"
    by_option = read_profile("with space", {"HOME": str(home), "AWS_PROFILE": "ci"})
    assert (by_option.name, by_option.is_named) == ("with space", True)
    assert by_option.setting("region") == "us-west-2"


def test_nested_settings_and_services_are_found(home: Path) -> None:
    found = read_profile("ci", {"HOME": str(home)})
    assert found.setting("s3.addressing_style") == "path"
    assert found.services["s3.endpoint_url"] == "https://minio.example.com"


def test_variables_name_other_files(home: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("[x]\naws_access_key_id = AKIAX\n")
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "c"), "AWS_CONFIG_FILE": "/nowhere/config"}
    found = read_profile("x", environment)
    assert found.credentials.profile("x") == {"aws_access_key_id": "AKIAX"}
    assert found.files == f"{tmp_path / 'c'} and /nowhere/config"


def test_without_files_there_are_no_settings(tmp_path: Path) -> None:
    found = read_profile(None, {"HOME": str(tmp_path)})
    assert found.setting("region") is None


@pytest.mark.parametrize("environment", [{}, {"AWS_PROFILE": "home"}])
def test_a_profile_that_does_not_exist_is_an_error_with_those_that_do(
    home: Path, environment: dict[str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        read_profile(None if environment else "home", {"HOME": str(home)} | environment)
    text = str(caught.value)
    assert text.startswith(f"AWS profile 'home': neither in {home}/.aws/credentials nor in ")
    assert text.endswith("there is: default, ci")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"aws_secret_access_key = hidden\n", "line 1 is in no [profile]; correct it"),
        (b"[default]\nregion = x\nhidden text\n", "line 3 is not a setting; correct it"),
        (b"[default]\ns3 =\n  hidden\n", "s3 has a line that is not a setting; correct it"),
        (b"[default]\n\xff = hidden\n", "not UTF-8 text; write it as UTF-8"),
        (b"#" * (files.MAX_FILE_SIZE + 1), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_none_is_an_error_that_shows_nothing_of_it(
    content: bytes, said: str, home: Path
) -> None:
    (home / ".aws/config").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_profile(None, {"HOME": str(home)})
    assert str(caught.value).startswith(f"{home}/.aws/config: {said}")
    assert "hidden" not in str(caught.value)


def test_a_named_pipe_is_not_waited_for(home: Path) -> None:
    (home / ".aws/config").unlink()
    os.mkfifo(home / ".aws/config")
    with pytest.raises(UsageError, match="not a regular file"):
        read_profile(None, {"HOME": str(home)})


def test_who_may_write_and_read_a_file_is_known(home: Path) -> None:
    (home / ".aws/config").chmod(0o646)
    found = read_profile(None, {"HOME": str(home)})
    assert found.config.readable_by_others
    assert not found.config.may_name_commands
    assert found.credentials.may_name_commands
    assert not found.credentials.readable_by_others


PIECES = st.sampled_from(
    [
        *"[]= \n\t:#;\0'\"",
        "[default]",
        "[profile x]",
        "key",
        "s3 =\n",
        "  a = b\n",
        "services",
        "\r",
        "\x85",
        "\u2028",
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join))
def test_any_text_is_settings_or_an_error_for_users(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    home = tmp_path_factory.getbasetemp()
    (home / "any").write_text(text, newline="")
    environment = {"AWS_CONFIG_FILE": str(home / "any"), "AWS_SHARED_CREDENTIALS_FILE": str(home / "any")}
    try:
        found = read_profile(None, environment)
    except UsageError:
        return
    assert all(isinstance(value, str) for value in found.config.profile("default").values())

"""Which place the key of a bucket comes from, in the order of AWS's tools.

Source of the order: AWS, "Configuration settings and precedence" of the CLI. Nothing is asked here: a command
runs, and a service is asked, when the source is opened. `pbsfs.access.buckets` calls `find_key`. Synchronous.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections.abc import Mapping

from pbsfs.access.aws.ask import Service
from pbsfs.access.aws.files import AwsFile, AwsProfile
from pbsfs.access.aws.keys import ADVICE, CommandKey, GivenKey, KeySource
from pbsfs.access.aws.services import ContainerKey, InstanceKey
from pbsfs.access.aws.sts import WebIdentityKey
from pbsfs.access.credentials import (
    ACCESS_KEY_VARIABLE,
    CONTAINER_TOKEN_VARIABLE,
    SECRET_KEY_VARIABLE,
    TOKEN_VARIABLE,
    find_secret,
)
from pbsfs.base.errors import AuthError, UsageError
from pbsfs.base.text import quoted
from pbsfs.sources.http.proxy import EXCEPTIONS, VARIABLES

log = logging.getLogger(__name__)

WEB_TOKEN_VARIABLE = "AWS_WEB_IDENTITY_TOKEN_FILE"  # noqa: S105 - a name
ROLE_VARIABLE = "AWS_ROLE_ARN"
SESSION_VARIABLE = "AWS_ROLE_SESSION_NAME"
STS_VARIABLES = ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL")
RELATIVE_VARIABLE = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
FULL_VARIABLE = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
CONTAINER_TOKEN_FILE_VARIABLE = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"  # noqa: S105 - a name
INSTANCE_DISABLED_VARIABLE = "AWS_EC2_METADATA_DISABLED"
INSTANCE_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
INSTANCE_MODE_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"

CONTAINER_SERVICE = "http://169.254.170.2"
INSTANCE_SERVICES = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}

_CONTAINER_HOSTS = ("169.254.170.2", "169.254.170.23", "fd00:ec2::23", "localhost")
"""Hosts that may get a container's token without TLS, besides loopback addresses."""

_SESSION = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)

_OTHER_WAYS = ("source_profile", "credential_source", "sso_session", "sso_start_url", "login_session")
"""Settings of profiles whose key takes more than pbsfs does: AWS's own program gives it."""


def find_key(
    profile: AwsProfile, region: str | None, environment: Mapping[str, str], ca: str | None = None
) -> KeySource:
    """The place of the key. `region`, `ca`: of the requests to STS.

    Raises UsageError for a setting that makes no sense, and AuthError if there is no place.
    """
    if not profile.is_named:
        named = environment.get(WEB_TOKEN_VARIABLE), environment.get(ROLE_VARIABLE)
        found = _of_environment(environment) or _of_web_identity(profile, *named, region, environment, ca)
        if found is not None:
            return found
    found = _of_profile(profile, region, environment, ca)
    if found is not None:
        return found
    if profile.is_named:
        raise AuthError(
            f"AWS profile {quoted(profile.name)}: no key in {profile.files}; add aws_access_key_id and "
            "aws_secret_access_key, or credential_process"
        )
    return _of_container(environment) or _of_instance(profile, environment)


def _of_environment(environment: Mapping[str, str]) -> KeySource | None:
    access, secret, token = (
        find_secret(variable, None, environment)
        for variable in (ACCESS_KEY_VARIABLE, SECRET_KEY_VARIABLE, TOKEN_VARIABLE)
    )
    if not access or not access.reveal():
        return None
    if not secret or not secret.reveal():
        raise UsageError(f"{ACCESS_KEY_VARIABLE}: {SECRET_KEY_VARIABLE} is not set; set both")
    return GivenKey("the environment", access.reveal(), secret.reveal(), token.reveal() if token else None)


def _of_profile(
    profile: AwsProfile, region: str | None, environment: Mapping[str, str], ca: str | None
) -> KeySource | None:
    """The key of the profile in AWS's files."""
    name = f"AWS profile {quoted(profile.name)}"
    token_file, role = profile.setting("web_identity_token_file"), profile.setting("role_arn")
    if token_file and role:
        return _of_web_identity(profile, token_file, role, region, environment, ca)
    other = next((each for each in _OTHER_WAYS if profile.setting(each)), None)
    if role is not None or other is not None:
        raise UsageError(
            f"{name}: pbsfs gets no key by {other or 'role_arn'}; name a profile with credential_process = "
            f"aws configure export-credentials --profile {profile.name} --format process"
        )
    return (
        _given(profile.credentials, name, profile.name)
        or _command(profile, name)
        or _given(profile.config, name, profile.name)
    )


def _given(file: AwsFile, name: str, profile: str) -> KeySource | None:
    settings = file.profile(profile)
    access, secret = settings.get("aws_access_key_id"), settings.get("aws_secret_access_key")
    if not access and not secret:
        return None
    if not access or not secret:
        missing = "aws_secret_access_key" if access else "aws_access_key_id"
        raise UsageError(f"{file.path}: {name} has no {missing}; add it")
    if file.readable_by_others:
        log.warning("%s: every user of this machine may read it; run chmod o-r on it", file.path)
    return GivenKey(f"{name} in {file.path}", access, secret, settings.get("aws_session_token") or None)


def _command(profile: AwsProfile, name: str) -> KeySource | None:
    for file in (profile.credentials, profile.config):
        command = file.profile(profile.name).get("credential_process")
        if command and not file.may_name_commands:
            raise UsageError(
                f"{file.path}: {name} names a command, and others can write the file; run chown and "
                "chmod go-w on it"
            )
        if command:
            return CommandKey(f"credential_process of {name} in {file.path}", command)
    return None


def _of_web_identity(
    profile: AwsProfile,
    token_file: str | None,
    role: str | None,
    region: str | None,
    environment: Mapping[str, str],
    ca: str | None,
) -> KeySource | None:
    if not token_file:
        return None
    if not role:
        raise UsageError(f"{WEB_TOKEN_VARIABLE}: {ROLE_VARIABLE} is not set; set both")
    session = environment.get(SESSION_VARIABLE) or profile.setting("role_session_name")
    session = session or f"pbsfs-{int(time.time())}"
    if not _SESSION.fullmatch(session):
        raise UsageError(f"{SESSION_VARIABLE}: not a name; use letters, digits and +=,.@-, 2 to 64 of them")
    url = next((environment[each] for each in STS_VARIABLES if environment.get(each)), None)
    url = url or profile.setting("endpoint_url") or _sts_of(region)
    Service.parse(url, STS_VARIABLES[0])
    proxies = {each: environment[each] for each in (*VARIABLES, *EXCEPTIONS) if environment.get(each)}
    return WebIdentityKey(url, role, token_file, session, proxies, ca)


def _sts_of(region: str | None) -> str:
    """The address of STS. Source: AWS, "AWS STS Regional endpoints"."""
    if region is None or not re.fullmatch(r"[a-z0-9-]+", region):
        return "https://sts.amazonaws.com"
    return f"https://sts.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _of_container(environment: Mapping[str, str]) -> KeySource | None:
    relative, full = environment.get(RELATIVE_VARIABLE), environment.get(FULL_VARIABLE)
    if not relative and not full:
        return None
    if relative:
        url, variable = f"{CONTAINER_SERVICE}/{relative.lstrip('/')}", RELATIVE_VARIABLE
    else:
        url, variable = full or "", FULL_VARIABLE
    service = Service.parse(url, variable)
    if not service.secure and not _is_local(service.host):
        raise UsageError(
            f"{variable}: {quoted(service.host)} is not on this machine; such a service needs https://"
        )
    return ContainerKey(
        url,
        environment.get(CONTAINER_TOKEN_VARIABLE) or None,
        environment.get(CONTAINER_TOKEN_FILE_VARIABLE) or None,
    )


def _is_local(host: str) -> bool:
    try:
        return host in _CONTAINER_HOSTS or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _of_instance(profile: AwsProfile, environment: Mapping[str, str]) -> KeySource:
    variables = f"{ACCESS_KEY_VARIABLE}, {WEB_TOKEN_VARIABLE} and {RELATIVE_VARIABLE} are not set"
    looked = f"no key for the bucket: {variables}; {profile.files} have none for profile {profile.name}"
    if environment.get(INSTANCE_DISABLED_VARIABLE, "").lower() == "true":
        raise AuthError(f"{looked}; {INSTANCE_DISABLED_VARIABLE} is set; {ADVICE}")
    mode = environment.get(INSTANCE_MODE_VARIABLE, "").lower() or "ipv4"
    if mode not in INSTANCE_SERVICES:
        raise UsageError(f"{INSTANCE_MODE_VARIABLE}: not a mode; use {' or '.join(INSTANCE_SERVICES)}")
    url = environment.get(INSTANCE_VARIABLE) or INSTANCE_SERVICES[mode]
    Service.parse(url, INSTANCE_VARIABLE)
    return InstanceKey(url, looked)

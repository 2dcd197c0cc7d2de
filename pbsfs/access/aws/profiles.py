"""The place of the key of one profile in the files of AWS's tools: in the files, or where they say.

Source: AWS, "Settings reference" and "Assume role credential provider" of the SDKs and tools reference; what
they leave open is as botocore does it. Nothing is asked here. Used by `find`. Synchronous.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pbsfs.access.aws.ask import Route, Service
from pbsfs.access.aws.files import AwsFile, AwsProfile
from pbsfs.access.aws.keys import CommandKey, GivenKey, KeySource
from pbsfs.access.aws.login import OIDC_VARIABLE
from pbsfs.access.aws.sso import SSO_VARIABLE, LoginKey
from pbsfs.access.aws.sts import RoleKey, WebIdentityKey
from pbsfs.access.aws.surroundings import (
    WEB_TOKEN_VARIABLE,
    is_local,
    of_container,
    of_environment,
    of_instance,
)
from pbsfs.base.errors import UsageError
from pbsfs.base.text import printable, quoted
from pbsfs.sources.bucket.address import DEFAULT_REGION
from pbsfs.sources.http.proxy import EXCEPTIONS, VARIABLES

log = logging.getLogger(__name__)

ROLE_VARIABLE = "AWS_ROLE_ARN"
SESSION_VARIABLE = "AWS_ROLE_SESSION_NAME"
STS_VARIABLES = ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL")

_SESSION = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)
_EXTERNAL_ID = re.compile(r"[\w+=,.@:/-]{2,1224}", re.ASCII)
_DURATIONS = range(900, 43_201)
"""Seconds for which STS gives the key of a role. Source of these three: AWS, "AssumeRole"."""

_MOST_ROLES = 10
_REGION = re.compile(r"[a-z0-9-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all profiles share. `region`, `ca`: of requests to STS."""

    region: str | None
    environment: Mapping[str, str]
    ca: str | None

    @property
    def route(self) -> Route:
        """How STS and the portal are reached."""
        names = (*VARIABLES, *EXCEPTIONS)
        return Route({each: self.environment[each] for each in names if self.environment.get(each)}, self.ca)

    def sts(self, profile: AwsProfile) -> str:
        """The address of the token service for a role of `profile`. Raises UsageError."""
        url = next((self.environment[each] for each in STS_VARIABLES if self.environment.get(each)), None)
        url = url or profile.setting("endpoint_url") or _sts_of(self.region)
        Service.parse(url, STS_VARIABLES[0])
        return url


def of_profile(
    profile: AwsProfile, surroundings: Surroundings, seen: tuple[str, ...] = ()
) -> KeySource | None:
    """The place of the key of `profile`; None if its settings name none. Raises UsageError, AuthError.

    `seen`: the profiles whose roles take the key of this one.
    """
    name = f"AWS profile {quoted(profile.name)}"
    token_file, role = profile.setting("web_identity_token_file"), profile.setting("role_arn")
    if token_file and role:
        return web_identity(profile, token_file, role, surroundings)
    # A profile may take its own key for its role, and its key counts more than its role for other roles.
    if role is not None and not (seen and _has_key(profile)):
        return _of_role(profile, role, surroundings, seen)
    found = (
        _of_login(profile, surroundings)
        or _given(profile.credentials, name, profile.name)
        or _command(profile, name)
        or _given(profile.config, name, profile.name)
    )
    if found is None and profile.setting("login_session"):
        raise _unsupported(profile, "login_session")
    return found


def _of_login(profile: AwsProfile, surroundings: Surroundings) -> KeySource | None:
    """The key that a login by SSO gives; None if the profile has no role for one. Raises UsageError."""
    name = f"AWS profile {quoted(profile.name)}"
    account, role = profile.setting("sso_account_id"), profile.setting("sso_role_name")
    if account is None and role is None:
        return None
    session = profile.setting("sso_session")
    shared = {} if session is None else profile.section(f"sso-session {session}")
    if shared is None:
        raise UsageError(f"{name}: there is no [sso-session {printable(session or '')}]; correct sso_session")
    start = shared.get("sso_start_url") or profile.setting("sso_start_url")
    region = shared.get("sso_region") or profile.setting("sso_region")
    for setting, value in (
        ("sso_account_id", account),
        ("sso_role_name", role),
        ("sso_start_url", start),
        ("sso_region", region),
    ):
        if not value:
            raise UsageError(f"{name}: it has no {setting}; add it")
    urls: list[str] = []
    for variable, service in ((SSO_VARIABLE, "portal.sso"), (OIDC_VARIABLE, "oidc")):
        url = surroundings.environment.get(variable) or _url_of(name, service, region or "")
        place = Service.parse(url, variable)
        if not place.secure and not is_local(place.host):
            raise UsageError(f"{variable}: {quoted(place.host)} is not on this machine; write https://")
        urls.append(url)
    # Source: botocore, `SSOTokenLoader`.
    digest = hashlib.sha1((session or start or "").encode(), usedforsecurity=False).hexdigest()
    home = surroundings.environment.get("HOME") or os.path.expanduser("~")
    return LoginKey(
        urls[0],
        urls[1],
        account or "",
        role or "",
        f"{home}/.aws/sso/cache/{digest}.json",
        profile.name,
        surroundings.route,
    )


def _url_of(name: str, service: str, region: str) -> str:
    """A service of IAM Identity Center. Source: AWS, "IAM Identity Center endpoints and quotas"."""
    if not _REGION.fullmatch(region):
        raise UsageError(f"{name}: sso_region {quoted(region)} is not the name of a region; correct it")
    return f"https://{service}.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _has_key(profile: AwsProfile) -> bool:
    return any(profile.setting(each) for each in ("aws_access_key_id", "aws_secret_access_key"))


def _unsupported(profile: AwsProfile, setting: str) -> UsageError:
    return UsageError(
        f"AWS profile {quoted(profile.name)}: pbsfs gets no key by {setting}; name a profile with "
        f"credential_process = aws configure export-credentials --profile {profile.name} --format process"
    )


def _of_role(profile: AwsProfile, role: str, surroundings: Surroundings, seen: tuple[str, ...]) -> KeySource:
    """The key of a role, which STS gives for the key of another place."""
    name = f"AWS profile {quoted(profile.name)}"
    external_id, duration = profile.setting("external_id"), profile.setting("duration_seconds")
    if profile.setting("mfa_serial") is not None:
        raise _unsupported(profile, "mfa_serial")
    if external_id is not None and not _EXTERNAL_ID.fullmatch(external_id):
        raise UsageError(f"{name}: external_id is not one of AWS; correct it")
    if duration is not None and not (
        duration.isascii() and duration.isdigit() and len(duration) < 6 and int(duration) in _DURATIONS
    ):
        raise UsageError(
            f"{name}: duration_seconds is not valid; write a number from {_DURATIONS[0]} to {_DURATIONS[-1]}"
        )
    return RoleKey(
        surroundings.sts(profile),
        surroundings.region or DEFAULT_REGION,
        role,
        _session(profile, {}),
        _source(profile, surroundings, (*seen, profile.name)),
        external_id,
        None if duration is None else int(duration),
        surroundings.route,
    )


def _source(profile: AwsProfile, surroundings: Surroundings, seen: tuple[str, ...]) -> KeySource:
    """The place of the key with which STS is asked for the role of `profile`."""
    name = f"AWS profile {quoted(profile.name)}"
    if len(seen) > _MOST_ROLES:
        raise UsageError(f"{name}: more than {_MOST_ROLES} roles are taken one after the other; use fewer")
    other, place = profile.setting("source_profile"), profile.setting("credential_source")
    if (other is None) == (place is None):
        words = "neither source_profile nor" if other is None else "both source_profile and"
        raise UsageError(f"{name}: its role_arn has {words} credential_source; set one of them")
    if other is None:
        environment = surroundings.environment
        places: dict[str, Callable[[], KeySource | None]] = {
            "environment": lambda: of_environment(environment),
            "ecscontainer": lambda: of_container(environment),
            "ec2instancemetadata": lambda: of_instance(profile, environment),
        }
        found = places.get((place or "").lower())
        if found is None:
            raise UsageError(
                f"{name}: credential_source {quoted(place or '')} is not known; write Environment, "
                "EcsContainer or Ec2InstanceMetadata"
            )
        key, missing = found(), f"credential_source {place}"
    else:
        if other in seen[:-1]:
            raise UsageError(f"{name}: its source_profile leads back to {quoted(other)}; correct it")
        key, missing = of_profile(profile.named(other), surroundings, seen), f"source_profile {quoted(other)}"
    if key is None:
        raise UsageError(f"{name}: {missing} has no key; add one there")
    return key


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


def web_identity(
    profile: AwsProfile, token_file: str, role: str | None, surroundings: Surroundings
) -> KeySource:
    """The key of a role, which STS gives for the token in a file. Raises UsageError."""
    if not role:
        raise UsageError(f"{WEB_TOKEN_VARIABLE}: {ROLE_VARIABLE} is not set; set both")
    session = _session(profile, surroundings.environment)
    url = surroundings.sts(profile)
    return WebIdentityKey(url, role, token_file, session, surroundings.route)


def _session(profile: AwsProfile, environment: Mapping[str, str]) -> str:
    """The name that AWS's logs show for requests with the key of a role. Raises UsageError."""
    given = environment.get(SESSION_VARIABLE)
    session = given or profile.setting("role_session_name") or f"pbsfs-{int(time.time())}"
    if not _SESSION.fullmatch(session):
        what = SESSION_VARIABLE if given else f"AWS profile {quoted(profile.name)}: role_session_name"
        raise UsageError(f"{what}: not a name; use letters, digits and +=,.@-, 2 to 64 of them")
    return session


def _sts_of(region: str | None) -> str:
    """The address of STS. Source: AWS, "AWS STS Regional endpoints"."""
    if region is None or not _REGION.fullmatch(region):
        return "https://sts.amazonaws.com"
    return f"https://sts.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"

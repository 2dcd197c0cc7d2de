"""The places of a key outside the files of AWS's tools: variables, services of containers and machines.

Nothing is asked here. Used by `find`, and by `profiles` where a profile names one of them. Synchronous.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from pbsfs.access.aws.ask import Service
from pbsfs.access.aws.files import AwsProfile
from pbsfs.access.aws.keys import ADVICE, GivenKey, KeySource
from pbsfs.access.aws.services import ContainerKey, InstanceKey
from pbsfs.access.credentials import (
    ACCESS_KEY_VARIABLE,
    CONTAINER_TOKEN_VARIABLE,
    SECRET_KEY_VARIABLE,
    TOKEN_VARIABLE,
    find_secret,
)
from pbsfs.base.errors import AuthError, UsageError
from pbsfs.base.text import quoted

WEB_TOKEN_VARIABLE = "AWS_WEB_IDENTITY_TOKEN_FILE"  # noqa: S105 - a name
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


def of_environment(environment: Mapping[str, str]) -> KeySource | None:
    """The key in variables; None if there is none. Raises UsageError for half a key."""
    access, secret, token = (
        find_secret(variable, None, environment)
        for variable in (ACCESS_KEY_VARIABLE, SECRET_KEY_VARIABLE, TOKEN_VARIABLE)
    )
    if not access or not access.reveal():
        return None
    if not secret or not secret.reveal():
        raise UsageError(f"{ACCESS_KEY_VARIABLE}: {SECRET_KEY_VARIABLE} is not set; set both")
    return GivenKey("the environment", access.reveal(), secret.reveal(), token.reveal() if token else None)


def of_container(environment: Mapping[str, str]) -> KeySource | None:
    """The service of a container; None if variables name none. Raises UsageError."""
    relative, full = environment.get(RELATIVE_VARIABLE), environment.get(FULL_VARIABLE)
    if not relative and not full:
        return None
    if relative:
        url, variable = f"{CONTAINER_SERVICE}/{relative.lstrip('/')}", RELATIVE_VARIABLE
    else:
        url, variable = full or "", FULL_VARIABLE
    service = Service.parse(url, variable)
    if not service.secure and not is_local(service.host):
        raise UsageError(
            f"{variable}: {quoted(service.host)} is not on this machine; such a service needs https://"
        )
    return ContainerKey(
        url,
        environment.get(CONTAINER_TOKEN_VARIABLE) or None,
        environment.get(CONTAINER_TOKEN_FILE_VARIABLE) or None,
    )


def of_instance(profile: AwsProfile, environment: Mapping[str, str]) -> KeySource:
    """The metadata service of a machine. Raises AuthError if it may not be asked, UsageError.

    `profile`: has no key, for the error.
    """
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


def is_local(host: str) -> bool:
    """Whether a host may get a token without TLS."""
    try:
        return host in _CONTAINER_HOSTS or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

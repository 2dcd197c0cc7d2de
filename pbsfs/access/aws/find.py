"""Which place the key of a bucket comes from, in the order of AWS's tools.

Source of the order: AWS, "Configuration settings and precedence" of the CLI. Nothing is asked here: a command
runs, and a service is asked, when the source is opened. `pbsfs.access.buckets` calls `find_key`. Synchronous.
"""

from __future__ import annotations

from collections.abc import Mapping

from pbsfs.access.aws.files import AwsProfile
from pbsfs.access.aws.keys import KeySource
from pbsfs.access.aws.profiles import ROLE_VARIABLE, Surroundings, of_profile, web_identity
from pbsfs.access.aws.surroundings import WEB_TOKEN_VARIABLE, of_container, of_environment, of_instance
from pbsfs.base.errors import AuthError
from pbsfs.base.text import quoted


def find_key(
    profile: AwsProfile, region: str | None, environment: Mapping[str, str], ca: str | None = None
) -> KeySource:
    """The place of the key. `region`, `ca`: of the requests to STS.

    Raises UsageError for a setting that makes no sense, and AuthError if there is no place.
    """
    surroundings = Surroundings(region, environment, ca)
    if not profile.is_named:
        found = of_environment(environment)
        if found is None and (token_file := environment.get(WEB_TOKEN_VARIABLE)):
            found = web_identity(profile, token_file, environment.get(ROLE_VARIABLE), surroundings)
        if found is not None:
            return found
    found = of_profile(profile, surroundings)
    if found is not None:
        return found
    if profile.is_named:
        raise AuthError(
            f"AWS profile {quoted(profile.name)}: no key in {profile.files}; add aws_access_key_id and "
            "aws_secret_access_key, or credential_process"
        )
    return of_container(environment) or of_instance(profile, environment)

"""The environment variables that pbsfs reads, and what each says. `manual.py` and `reference.py` show them.

The names are those of the modules that read them; a test finds a variable that is missing here.
"""

from __future__ import annotations

from pbsfs.access.aws.files import CONFIG_VARIABLE, CREDENTIALS_VARIABLE, PROFILE_VARIABLES
from pbsfs.access.aws.login import OIDC_VARIABLE
from pbsfs.access.aws.profiles import ROLE_VARIABLE, SESSION_VARIABLE, STS_VARIABLES
from pbsfs.access.aws.sso import SSO_VARIABLE
from pbsfs.access.aws.surroundings import (
    CONTAINER_TOKEN_FILE_VARIABLE,
    FULL_VARIABLE,
    INSTANCE_DISABLED_VARIABLE,
    INSTANCE_MODE_VARIABLE,
    INSTANCE_VARIABLE,
    RELATIVE_VARIABLE,
    WEB_TOKEN_VARIABLE,
)
from pbsfs.access.buckets import (
    CA_VARIABLE,
    ENDPOINT_VARIABLES,
    IGNORE_ENDPOINTS_VARIABLE,
    REGION_VARIABLES,
)
from pbsfs.access.caching import CACHE_VARIABLE, SIZE_VARIABLE
from pbsfs.access.credentials import (
    ACCESS_KEY_VARIABLE,
    CONTAINER_TOKEN_VARIABLE,
    CREDENTIALS_DIRECTORY,
    FORMS,
    KEY_PASSWORD_VARIABLE,
    MASTER_PASSWORD_VARIABLE,
    PASSWORD_VARIABLE,
    SECRET_KEY_VARIABLE,
    TOKEN_VARIABLE,
)
from pbsfs.access.options import (
    BUCKET_VARIABLE,
    DIRECTORY_VARIABLE,
    FINGERPRINT_VARIABLE,
    NAMESPACE_VARIABLE,
    PARTS,
    PROFILE_VARIABLE,
    REPOSITORY_VARIABLE,
)
from pbsfs.chunks.decoder import PURE_VARIABLE
from pbsfs.runtime.logs import FORMAT_VARIABLE
from pbsfs.sources.http.proxy import EXCEPTIONS
from pbsfs.sources.http.proxy import VARIABLES as PROXIES

_CLIENT = "proxmox-backup-client"
_FORMS = f"Also with {', '.join(form for form in FORMS if form)}, and the systemd credential"

VARIABLES = {
    PROFILE_VARIABLE: "Read from the source of this profile in the configuration.",
    DIRECTORY_VARIABLE: "Read the datastore in this directory, without a server.",
    BUCKET_VARIABLE: "Read the datastore in this S3 bucket, without a server: s3://BUCKET/DATASTORE.",
    REPOSITORY_VARIABLE: "Read from this server: [[user@realm[!token]@]host[:port]:]datastore. "
    f"{_FORMS} {_CLIENT}.repository.",
    PARTS["server"]: "Read from this server, given by the parts of a repository (default: localhost).",
    PARTS["port"]: f"Connect to this port of {PARTS['server']} (default: 8007).",
    PARTS["datastore"]: f"Read this datastore of {PARTS['server']}.",
    PARTS["auth_id"]: f"Log in to {PARTS['server']} as this user or token (default: root@pam).",
    NAMESPACE_VARIABLE: "Start at this namespace (default: the root namespace).",
    PASSWORD_VARIABLE: f"The password, or the secret of an API token. {_FORMS} {_CLIENT}.password (default: "
    "pbsfs asks at a terminal).",
    FINGERPRINT_VARIABLE: f"Trust only the server's certificate with this SHA-256. {_FORMS} "
    f"{_CLIENT}.fingerprint (default: ~/.config/proxmox-backup/fingerprints).",
    KEY_PASSWORD_VARIABLE: f"The password of key files. {_FORMS} {_CLIENT}.encryption-password (default: "
    "pbsfs asks at a terminal).",
    MASTER_PASSWORD_VARIABLE: "The password of a master key, for pbsfs key recover. Also with "
    f"{', '.join(form for form in FORMS if form)} (default: {KEY_PASSWORD_VARIABLE}, or pbsfs asks at a "
    "terminal).",
    f"{ACCESS_KEY_VARIABLE}, {SECRET_KEY_VARIABLE}, {TOKEN_VARIABLE}": "The access key for a bucket: its ID, "
    f"its secret, and the token of a temporary one. Also with {', '.join(form for form in FORMS if form)}.",
    ", ".join(PROFILE_VARIABLES): "Take the access key, endpoint and region of a bucket from this profile in "
    "the files of AWS's tools (default: default). The first that is set counts.",
    f"{CREDENTIALS_VARIABLE}, {CONFIG_VARIABLE}": "The files of AWS's tools (default: ~/.aws/credentials and "
    "~/.aws/config).",
    ", ".join(ENDPOINT_VARIABLES): "Reach the bucket at this address (default: AWS's of the region). The "
    "first that is set counts.",
    IGNORE_ENDPOINTS_VARIABLE: "If true, use no endpoint of variables and of the files of AWS's tools.",
    ", ".join(REGION_VARIABLES): "Sign requests for this region (default: us-east-1). The first that is set "
    "counts.",
    CA_VARIABLE: "Trust only certificates of an object store that a CA in this PEM file signed (default: "
    "the system's CAs).",
    f"{WEB_TOKEN_VARIABLE}, {ROLE_VARIABLE}, {SESSION_VARIABLE}": "Get the access key of this role from "
    "AWS's token service (STS), by the token in this file and under this name.",
    STS_VARIABLES[0]: "The address of STS (default: AWS's of the region).",
    SSO_VARIABLE: "The address of the portal that gives keys for a login (default: AWS's of sso_region).",
    OIDC_VARIABLE: "The address of the service that renews such a login (default: AWS's of sso_region).",
    f"{RELATIVE_VARIABLE}, {FULL_VARIABLE}": "Get the access key from the service for containers at this "
    "path or address. AWS sets one of them.",
    f"{CONTAINER_TOKEN_VARIABLE}, {CONTAINER_TOKEN_FILE_VARIABLE}": "The token for that service, or the file "
    "that has it. AWS sets one of them.",
    INSTANCE_DISABLED_VARIABLE: "If true, never ask the metadata service of a machine for an access key.",
    f"{INSTANCE_VARIABLE}, {INSTANCE_MODE_VARIABLE}": "The address of that service, or ipv4 or ipv6 "
    "(default: ipv4, 169.254.169.254).",
    CREDENTIALS_DIRECTORY: "The directory of the credentials that systemd gives to a unit.",
    ", ".join(PROXIES): "The HTTP proxy to the server: http://[USER:PASSWORD@]HOST[:PORT]. The first that is "
    "set counts.",
    ", ".join(EXCEPTIONS): "Servers that pbsfs reaches without the proxy: names, addresses, networks, or *.",
    CACHE_VARIABLE: "Keep what was fetched from a server in this directory.",
    SIZE_VARIABLE: "Use at most this much of the disk for it (default: 50G).",
    FORMAT_VARIABLE: "Log lines of text (text), or one JSON object per line (json) (default: text).",
    PURE_VARIABLE: "If set, pbsfs decodes chunks without its C extension, which takes longer.",
    "XDG_CONFIG_HOME": "The directory of the user's configuration, pbsfs/config.toml (default: ~/.config).",
    "XDG_STATE_HOME": "The directory of the log of a background mount, if there is no syslog (default: "
    "~/.local/state).",
    "XDG_RUNTIME_DIR, TMPDIR": "The directory of private sockets: the first that can be written (default: "
    "/tmp, /run, /dev/shm). XDG_RUNTIME_DIR also has what pbsfs login keeps (default: /run/user/UID), and "
    "TMPDIR the temporary files of pbsfs boot and pbsfs demo.",
    "NO_COLOR": "If set, pbsfs prints no colours.",
    "DISPLAY, WAYLAND_DISPLAY": "If one is set, pbsfs boot opens a window.",
}
"""What each variable, or several of one meaning, says."""

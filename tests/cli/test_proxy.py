"""Every way to a server through an HTTP proxy, by the real programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.nbd import nbdkit
from tests.support.needs import need
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.proxy import NAME, ConnectProxy
from tests.support.server import ReferenceServer
from tests.support.serving import PASSWORD, STORE, USER, access, without
from tests.support.stocked import IMAGE, Stocked

PROXY_PASSWORD = "s3cret/of the proxy"
QUOTED = "s3cret%2Fof%20the%20proxy"


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    """Asks for a user and password."""
    with ConnectProxy(user="me", password=PROXY_PASSWORD) as found:
        yield found


def told(server: ReferenceServer, proxy: ConnectProxy, **changes: str) -> dict[str, str]:
    """The environment in which pbsfs reads through the proxy, from a name that only the proxy knows."""
    usual = {
        "PBS_REPOSITORY": server.repository(USER, host=NAME),
        "HTTPS_PROXY": f"http://me:{QUOTED}@127.0.0.1:{proxy.port}",
    }
    return access(server, **(usual | changes))


def all_came_through(server: ReferenceServer, proxy: ConnectProxy) -> bool:
    assert set(proxy.targets) == {f"{NAME}:{server.port}"}
    return len(proxy.targets) == server.connections


def test_info_and_export_go_through_the_proxy(
    server: ReferenceServer, proxy: ConnectProxy, stocked: Stocked, tmp_path: Path
) -> None:
    environment = without(told(server, proxy), "PBS_FINGERPRINT")
    done = pbsfs(
        *("info", "--log-level", "debug", "--fingerprint", server.fingerprint, IMAGE), env=environment
    )
    assert done.returncode == 0
    assert "\nverify_state:    ok (" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    output_of(PBSFS, "export", IMAGE, tmp_path / "copy", env=told(server, proxy))
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IMAGE]
    assert all_came_through(server, proxy)


def test_a_ca_vouches_for_the_server_and_its_name_through_the_proxy(stocked: Stocked, tmp_path: Path) -> None:
    with ReferenceServer(stocked.path, store=STORE, ca_signed=True) as server, ConnectProxy() as proxy:
        server.add_user(USER, PASSWORD)
        (ca := tmp_path / "ca.pem").write_text(server.ca or "")
        changes = {
            "ALL_PROXY": f"127.0.0.1:{proxy.port}",
            "SSL_CERT_FILE": str(ca),
            "XDG_CONFIG_HOME": str(tmp_path),
        }
        known = access(server, PBS_REPOSITORY=server.repository(USER, host="localhost"), **changes)
        output_of(PBSFS, "info", IMAGE, env=without(known, "PBS_FINGERPRINT"))
        assert len(proxy.targets) == server.connections
        other = access(server, PBS_REPOSITORY=server.repository(USER, host=NAME), **changes)
        text = error_of(pbsfs("info", IMAGE, env=without(other, "PBS_FINGERPRINT")), 12)
        assert "Hostname mismatch" in text
        assert f"{NAME}:{server.port}" in text


@pytest.mark.mount
def test_a_mount_in_the_background_goes_through_the_proxy(
    server: ReferenceServer, proxy: ConnectProxy, stocked: Stocked, tmp_path: Path
) -> None:
    with mounted(told(server, proxy), tmp_path / "m", "--log-level", "debug") as mount:
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
        said = "".join(mount.log_lines())
    assert said
    assert "s3cret" not in said
    assert all_came_through(server, proxy)


def test_nbd_goes_through_the_proxy(
    server: ReferenceServer, proxy: ConnectProxy, stocked: Stocked, tmp_path: Path
) -> None:
    need("nbdkit", "nbdcopy")
    done = pbsfs("nbd", IMAGE, "--run", f"nbdcopy $uri '{tmp_path / 'copy'}'", env=told(server, proxy))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "copy").read_bytes().startswith(stocked.contents[IMAGE])
    assert all_came_through(server, proxy)


def test_the_plugin_goes_through_the_proxy(
    server: ReferenceServer, proxy: ConnectProxy, stocked: Stocked
) -> None:
    need("nbdkit")
    with nbdkit(told(server, proxy), f"path={IMAGE}") as served:
        assert served.read().startswith(stocked.contents[IMAGE])
    assert all_came_through(server, proxy)


def test_an_excepted_server_is_reached_directly(server: ReferenceServer, proxy: ConnectProxy) -> None:
    usual = told(server, proxy, PBS_REPOSITORY=server.repository(USER), NO_PROXY="a.org, 127.0.0.0/8")
    output_of(PBSFS, "info", IMAGE, env=usual)
    assert proxy.targets == []


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("http://me:s3cret@127.0.0.1:{port}", 10, "does not accept the user and password"),
        ("http://127.0.0.1:{port}", 10, "asks for a user and password"),
        ("socks5h://me:s3cret@127.0.0.1:{port}", 2, "socks5h:// proxies are not supported"),
        ("http://me:s3cret@:{port}", 2, "not the address of a proxy"),
        ("http://me:s3cret@127.0.0.1:1", 14, "cannot connect to the proxy 127.0.0.1:1: Connection refused"),
        ("http://me:s3cret@nobody.invalid:3128", 13, "the proxy's name 'nobody.invalid' does not resolve"),
    ],
)
def test_a_proxy_that_is_of_no_use_is_one_line(
    server: ReferenceServer, proxy: ConnectProxy, tmp_path: Path, value: str, status: int, words: str
) -> None:
    usual = told(server, proxy, HTTPS_PROXY=value.format(port=proxy.port))
    (place := tmp_path / "m").mkdir()
    for arguments in (("info", IMAGE), ("mount", place), ("nbd", IMAGE)):
        text = error_of(pbsfs(*arguments, env=usual), status)
        assert words in text
        assert "HTTPS_PROXY" in text
        assert "s3cret" not in text
    assert server.connections == 0

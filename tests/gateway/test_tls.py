"""HTTP beyond loopback: with a certificate that may change at any time, behind proxies that are named, and not in the
clear unless somebody says so."""

import os
import socket
import ssl
import subprocess
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from lorry.addresses import check_exposure
from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig, HttpSettings
from lorry.gateway.peers import peer_of
from lorry.wire.errors import InvalidRequestError
from tests.conftest import BASE_MODEL, LORRY, Server
from tests.network.parts import part

from .conftest import Tenant
from .test_privacy import alices

NOBODY = "tcp://127.0.0.1:9"


class Files:
    """A certificate and its key, which another authority may issue anew."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key, self._folder = folder / "cert.pem", folder / "key.pem", folder
        self.ca = self.issue()

    def issue(self, *, cert: bool = True, key: bool = True) -> trustme.CA:
        """Either of the files may stay as it is."""
        ca = trustme.CA()
        issued = ca.issue_cert("localhost", "127.0.0.1")
        if key:
            self._put(self.key, issued.private_key_pem.bytes())
        if cert:
            self._put(self.cert, b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return ca

    def _put(self, file: Path, content: bytes) -> None:
        new = self._folder / "new"
        new.write_bytes(content)
        new.rename(file)

    @property
    def settings(self) -> HttpSettings:
        return HttpSettings(str(self.cert), str(self.key))

    @property
    def options(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context


async def works(url: str, ca: trustme.CA) -> bool:
    """Whether a new connection trusts what it finds there."""
    async with httpx.AsyncClient(verify=trusting(ca)) as http:
        try:
            return (await http.get(f"{url}/api/v1/healthz")).status_code == 200
        except httpx.ConnectError:
            return False


async def test_a_certificate_that_changes_is_served_to_who_connects_next_and_to_nobody_else(files: Files) -> None:
    async with running(GatewayConfig(NOBODY, port=0, http=files.settings)) as url:
        assert url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(verify=trusting(files.ca), base_url=url) as earlier:
            await earlier.get("/api/v1/healthz")
            new = files.issue()
            assert await works(url, new) and not await works(url, files.ca)
            answer = await earlier.get("/api/v1/healthz")
            assert answer.status_code == 200, "an old connection goes on; a new one would not trust what it finds"


async def test_a_client_that_names_no_server_gets_the_new_certificate_too(files: Files) -> None:
    async with running(GatewayConfig(NOBODY, port=0, http=files.settings)) as url:
        port = int(url.rpartition(":")[2])

        def common(ca: trustme.CA) -> bool:
            context = trusting(ca)
            context.check_hostname = False
            with closing(socket.create_connection(("127.0.0.1", port))) as plain:
                try:
                    with context.wrap_socket(plain) as encrypted:  # without a server_hostname there is no SNI
                        return encrypted.version() is not None
                except ssl.SSLCertVerificationError:
                    return False

        assert await anyio.to_thread.run_sync(common, files.ca)
        new = files.issue()
        assert await anyio.to_thread.run_sync(common, new)
        assert not await anyio.to_thread.run_sync(common, files.ca)


async def test_a_new_pair_that_is_no_use_leaves_the_old_one_and_is_told_once(
    files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(GatewayConfig(NOBODY, port=0, http=files.settings)) as url:
        new = files.issue(key=False)
        for _ in range(2):
            assert await works(url, files.ca)
        files.cert.write_bytes(files.cert.read_bytes()[:200])
        assert await works(url, files.ca)
        files.cert.unlink()
        assert await works(url, files.ca)
        printed = "".join(capfd.readouterr())
        assert printed.count("the certificate stays what it was") == 3
        assert "tls_key is" in printed and "tls_cert is" in printed
        new = files.issue()
        assert await works(url, new)


def half_written(files: Files) -> HttpSettings:
    files.cert.write_bytes(files.cert.read_bytes()[:200])
    return files.settings


def anothers_key(files: Files) -> HttpSettings:
    files.issue(cert=False)
    return files.settings


def encrypted_key(files: Files) -> HttpSettings:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"x")))
    return files.settings


WRONG = {
    "tls_key is None": lambda files: HttpSettings(str(files.cert)),
    "tls_cert is None": lambda files: HttpSettings(None, str(files.key)),
    "tls_cert is '/nowhere.pem'": lambda files: replace(files.settings, tls_cert="/nowhere.pem"),
    "tls_key is '/nowhere.pem'": lambda files: replace(files.settings, tls_key="/nowhere.pem"),
    "a PEM file with a certificate": half_written,
    "a PEM file with the key of the certificate": anothers_key,
    "not encrypted": encrypted_key,
    "trusted_proxies is '10.0.0.1/8'": lambda files: HttpSettings(trusted_proxies="10.0.0.1/8"),
    "trusted_proxies is '*'": lambda files: HttpSettings(trusted_proxies="*"),
    "trusted_proxies is ''": lambda files: HttpSettings(trusted_proxies=""),
}


@pytest.mark.parametrize("words", WRONG)
async def test_what_is_wrong_at_the_start_is_refused_by_the_options_name(words: str, files: Files) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        async with running(GatewayConfig(NOBODY, port=0, http=WRONG[words](files))):
            pass
    assert words in str(refused.value)
    assert refused.value.field in ("tls_cert", "tls_key", "trusted_proxies")


def links_of(http: httpx.Client) -> str:
    """Where the links to a checkpoint's files are."""
    things = alices(http)
    return f"training_runs/{things.run_id}/checkpoints/{things.checkpoint_id}/external_weights_urls"


def test_the_sdk_works_through_tls_and_downloads_by_links_that_are_encrypted(
    http_server: Server, tenant: Tenant, files: Files, tmp_path: Path
) -> None:
    authority = tmp_path / "ca.pem"
    files.ca.cert_pem.write_to_path(authority)
    options = ("--connect", http_server.address, "--http", "127.0.0.1:0", "--data", str(http_server.data))
    with part("gateway", *options, *files.options) as gateway:
        url = gateway.announced["url"]
        assert url == f"https://{gateway.announced['http']}"
        secure = replace(tenant, server=replace(http_server, url=url), extra={"SSL_CERT_FILE": str(authority)})
        assert secure.run("training.supervised")["losses"]
        with httpx.Client(
            base_url=f"{url}/api/v1", headers={"X-API-Key": tenant.key}, verify=trusting(files.ca), timeout=None
        ) as http:
            urls = http.get(links_of(http)).json()["urls"]
            assert all(link.startswith(f"{url}/api/v1/files/") for link in urls.values())
            assert http.get(urls["adapter_config.json"], headers={"X-API-Key": ""}).status_code == 200


# Proxies -------------------------------------------------------------------------------------------------------------


async def link_through(proxies: str | None, headers: Mapping[str, str], tenant: Tenant, links: str) -> str:
    """How a link to a download begins that was asked for with these headers."""
    http_server = tenant.server
    config = GatewayConfig(
        http_server.address,
        port=0,
        checkpoints=http_server.data / "checkpoints",
        http=HttpSettings(trusted_proxies=proxies),
    )
    async with (
        running(config) as url,
        httpx.AsyncClient(base_url=f"{url}/api/v1", headers={"X-API-Key": tenant.key}, timeout=None) as http,
    ):
        found = await http.get(links, headers=headers)
    return found.json()["urls"]["adapter_config.json"].partition("/api/")[0]


async def test_only_a_proxy_that_is_named_is_believed(tenant: Tenant) -> None:
    with tenant.http() as http:
        links = links_of(http)
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "198.51.100.7", "Host": "lorry.example"}
    told = [await link_through(proxies, forwarded, tenant, links) for proxies in ("127.0.0.0/8", "10.0.0.0/8", None)]
    assert told == ["https://lorry.example", "http://lorry.example", "http://lorry.example"]


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_who_has_a_network_of_ipv6_is_one_peer(host: str, peer: str) -> None:
    assert peer_of(host) == peer


# In the clear --------------------------------------------------------------------------------------------------------

PUBLIC = ("0.0.0.0:0", "[::]:0", "192.0.2.1:80", "gpu.example:80", "[::ffff:127.0.0.1]:80")
SAID = (HttpSettings("cert", "key"), HttpSettings(trusted_proxies="10.0.0.0/8"), HttpSettings(plain_http=True))


@pytest.mark.parametrize("http", PUBLIC)
def test_what_is_not_encrypted_stays_on_loopback_unless_somebody_says_so(http: str) -> None:
    for said in SAID:
        check_exposure(http, said)
    with pytest.raises(InvalidRequestError) as refused:
        check_exposure(http, HttpSettings())
    for way in ("--tls-cert", "--tls-key", "--trusted-proxies", "--plain-http"):
        assert way in str(refused.value)
    for local in ("127.0.0.1:0", "localhost:1", "[::1]:0", "127.8.8.8:80"):
        check_exposure(local, HttpSettings())


@pytest.mark.parametrize("command", [("serve", "--model", f"a={BASE_MODEL}"), ("gateway",)], ids=lambda words: words[0])
def test_neither_command_serves_everybody_in_the_clear_by_accident(command: tuple[str, ...], tmp_path: Path) -> None:
    words = [*LORRY, *command, "--http", "0.0.0.0:0", "--data", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "500"})
    assert ended.returncode != 0
    assert "http is '0.0.0.0:0'" in ended.stderr and "--plain-http" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_handshake_that_never_ends_is_ended(files: Files) -> None:
    http = replace(files.settings, slow_after_s=1.0)
    async with running(GatewayConfig(NOBODY, port=0, http=http)) as url:
        async with await anyio.connect_tcp("127.0.0.1", int(url.rpartition(":")[2])) as silent:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await silent.receive()
        assert await works(url, files.ca)

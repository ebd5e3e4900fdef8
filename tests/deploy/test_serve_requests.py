"""Who may ask the page, under which name, and what a disk holds: without a trained run, and without a network."""

import asyncio
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

from deploy import serve
from pipelines.errors import UserError
from pipelines.inference import Answer

import numpy as np
import pytest

CROSS_SITE = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
Ask = Callable[..., tuple[int, bytes]]


class Decoders:
    """In place of processes that decode: each photo is of the first class. asked: whose photos, by address."""

    def __init__(self, *_: object, **__: object) -> None:
        self.asked: list[str] = []

    def is_full(self, _: str | None = None) -> bool:
        return False

    def submit(self, path: str, address: str, _: object = None) -> Future:
        self.asked.append(address)
        future: Future = Future()
        future.set_result(Answer(path, np.array([2, 0], np.float32), ""))
        return future


@pytest.fixture
def start(monkeypatch, tmp_path) -> Callable[..., Ask]:
    """What answers one request after the other. `ask.decoders` is what it decodes with."""
    monkeypatch.setattr(serve, "Decoders", Decoders)
    classifier = SimpleNamespace(classes=("ants", "bees"), preprocess=None, takes_whole=False, test_flips=False)

    def start(**settings: object) -> Ask:
        server = serve.make_server(classifier, {}, tmp_path, **settings)  # type: ignore[arg-type]
        server.config.load()

        def ask(
            method: str, path: str, body: bytes = b"", *, client: str = "127.0.0.1", **headers: str
        ) -> tuple[int, bytes]:
            lines = {"Host": "localhost"} | headers
            scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "root_path": ""}
            scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "client": (client, 1)}
            scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in lines.items()]
            sent: list[dict] = []

            async def receive() -> dict:
                return {"type": "http.request", "body": body}

            async def send(message: dict) -> None:
                sent.append(message)

            asyncio.run(server.config.loaded_app(scope, receive, send))
            return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

        ask.decoders = server.decoders  # type: ignore[attr-defined]
        return ask

    return start


@pytest.mark.parametrize("prefix", ["", "/photos"])
def test_only_the_page_and_its_health_may_be_asked_from_anywhere(start, prefix):
    """Starlette's routes match before a line's end too: `/classify%0A` is `/classify`."""
    ask = start(prefix=prefix)
    for path in ("/classify", "/classify\n", "/classify/"):
        assert ask("POST", prefix + path, b"photo", **CROSS_SITE)[0] == 403
    for path in ("/model", "/model\n", "/model/", "/nothing"):
        assert ask("GET", prefix + path, **CROSS_SITE)[0] == 403
    for path in ("/", "/health", *([""] if prefix else [])):
        assert ask("GET", prefix + path, **CROSS_SITE)[0] in (200, 307)
    assert ask("POST", prefix + "/classify", b"photo")[0] == 200
    assert ask("GET", prefix + "/nothing")[0] == 404


# Names


def test_the_addresses_that_are_printed():
    assert serve._address("::1", 80) == "http://[::1]:80/"
    assert serve._address("127.0.0.1", 80, "/photos") == "http://127.0.0.1:80/photos/"
    assert serve._address("::", 80).startswith(f"http://{socket.gethostname()}:80/ ")


@pytest.mark.parametrize("given", [[], ["photos.example"]])
@pytest.mark.parametrize(
    ("host", "address"),
    [
        *[("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("LocalHost.", "127.0.0.1"), ("Desk.", "127.0.1.1")],
        *[("0.0.0.0", "0.0.0.0"), ("::", "::"), ("192.0.2.7", "192.0.2.7"), ("Photos.LAN", "192.0.2.7")],
    ],
)
def test_a_server_knows_itself_by_the_address_that_it_prints(host, address, given, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk.local")
    names = serve._names(host, address, given)
    printed = serve._address(host, 8000).split()[0]
    assert serve._is_named(printed.removeprefix("http://").rstrip("/"), names)


def test_the_names_of_a_server_for_the_network():
    assert serve._names("0.0.0.0", "0.0.0.0", []) is None
    names = serve._names("0.0.0.0", "0.0.0.0", ["photos.example"])
    known = {host: serve._is_named(host, names) for host in ("photos.example:80", "192.0.2.7", "localhost", "evil.com")}
    assert list(known.values()) == [True, True, True, False]


def test_other_ports_of_the_machine_are_other_websites(start, monkeypatch):
    """Under the machine's own name too, which browsers send without Fetch Metadata where it is no HTTPS."""
    monkeypatch.setattr(socket, "gethostname", lambda: "desk")
    given = ["photos.example"]
    ask = start(names=serve._names("0.0.0.0", "0.0.0.0", given), proxied=given)
    for origin, status in (("http://desk:9000", 403), ("http://desk:8000", 200), ("https://photos.example", 200)):
        assert ask("GET", "/model", Host="desk:8000", Origin=origin)[0] == status


def _parsed(*flags: str) -> SimpleNamespace:
    return serve._parse(["run", *flags])  # type: ignore[return-value]


def test_names_and_origins_are_kept_as_browsers_send_them():
    names = ["Photos.Example.", "photos.example:8443", "desk_2", "192.0.2.7:80", "[::1]:8000", "FE80::1"]
    wanted = ["photos.example", "photos.example", "desk_2", "192.0.2.7", "::1", "fe80::1"]
    assert _parsed("--allow-host", *names).allow_host == wanted
    origins = {
        "https://Photos.example": "https://photos.example",
        "HTTPS://x:443": "https://x",
        "http://x:0080": "http://x",
        "http://x:443": "http://x:443",
        "https://[::1]:8000": "https://[::1]:8000",
        "chrome-extension://abc": "chrome-extension://abc",
        "null": "null",
    }
    assert _parsed("--allow-origin", *origins).allow_origin == list(origins.values())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("host", name) for name in ("https://photos.example", "photos.example/", "*", "*.example", ".example.com")],
        *[("host", name) for name in ("a, b", "a,b", "a b", "", "[", "a..b", "me@x", "x:", "x:http", "bücher.example")],
        *[("origin", text) for text in ("https://x/", "http://[", "x", "*", "https://*.x", "https://.x", "https://")],
        *[
            ("origin", text)
            for text in ("https://x:", "https://x:65536", "https://a@x", "https://x?", "https://bücher")
        ],
    ],
)
def test_names_and_origins_that_no_browser_sends_are_refused(flag, value):
    with pytest.raises(UserError, match=f"^--allow-{flag} ") as refused:
        _parsed(f"--allow-{flag}", "good.example" if flag == "host" else "https://good.example", value)
    assert "photos.example" in str(refused.value)


# What is stored


def _limited_files(size: int) -> AbstractContextManager:
    """In it a file takes `size` bytes: of a write that goes beyond them a part, as a disk does that becomes full."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited()


@pytest.mark.parametrize("length", [100_000, 300_000])  # less and more than what is in memory of an upload
def test_what_a_disk_takes_in_part_is_not_stored(start, tmp_path, length):
    ask = start()
    with _limited_files(65_536):
        status, answer = ask("POST", "/classify", bytes(length))
    assert (status, json.loads(answer)["error"]) == (507, "no room")
    assert ask.decoders.asked == []
    assert ask("POST", "/classify", bytes(length))[0] == 200
    assert not list(tmp_path.iterdir())


def test_the_room_is_what_the_disk_has_now(start, monkeypatch):
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    ask = start()
    for free, status in ((0, 507), (100_000, 507), (400_000, 200), (100_000, 507), (2**40, 200)):
        disk.free = free
        assert ask("POST", "/classify", bytes(100_000))[0] == status


# Addresses


def test_a_share_is_an_address_or_of_ipv6_a_network():
    """Also where a server listens by both, and sees addresses of IPv4 as those of IPv6."""
    shares = {
        "192.0.2.1": "192.0.2.1",
        "::ffff:192.0.2.1": "192.0.2.1",
        "2001:db8::7": "2001:db8::/64",
        "fe80::1%eth0": "fe80::/64",
    }
    for host, share in shares.items():
        assert serve._client(SimpleNamespace(client=SimpleNamespace(host=host))) == share


def test_a_proxy_on_this_machine_is_believed(start, monkeypatch):
    def share(ask: Ask, client: str) -> str:
        ask("POST", "/classify", b"photo", client=client, **{"X-Forwarded-For": "192.0.2.1"})
        return ask.decoders.asked[-1]  # type: ignore[attr-defined]

    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    ask = start()
    for client in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):  # the last of `--host ::`
        assert share(ask, client) == "192.0.2.1"
    assert share(ask, "192.0.2.9") == share(ask, "::ffff:192.0.2.9") == "192.0.2.9"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.9")
    ask = start()
    assert [share(ask, client) for client in ("192.0.2.9", "127.0.0.1")] == ["192.0.2.1", "127.0.0.1"]

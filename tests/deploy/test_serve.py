"""The page and its endpoint: evaluate.py's answers, whatever is sent, and nothing from or to elsewhere."""

import base64
import functools
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import connections, decoding, serve
from pipelines.data.decode import pixels_of_file
from pipelines.data.preprocess import Preprocess
from pipelines.inference import open_onnx, open_run
from tests.helpers.corpus import BROKEN_INSIDE, FAULTY, SOUND, ZOO, encoded, picture
from tests.helpers.paths import ROOT

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_watched: list[str] | None = None


def _hear(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and _watched is not None:
        _watched.append(str(arguments[1]))


sys.addaudithook(_hear)


@dataclass(frozen=True)
class Server:
    """A server in a thread of this process. folder: where it puts uploads."""

    port: int
    folder: Path
    decoders: decoding.Decoders | None = None

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def classify(self, body: object) -> tuple[int, dict]:
        status, answer = self.ask("POST", "/classify", body)
        return status, json.loads(answer)


@contextmanager
def _serving(run: Path, weights: str, folder: Path, **settings: object) -> Iterator[Server]:
    classifier = open_onnx(run / "export" / "model.onnx") if weights == "onnx" else open_run(run, torch.device("cpu"))
    listener = serve._listen("127.0.0.1", 0)
    server = serve.make_server(classifier, serve.describe(run), folder, **settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname()[1], folder, server.decoders)
    finally:
        server.should_exit = True
        thread.join()
        server.decoders.close()


@pytest.fixture(scope="module", params=["pytorch", "onnx"])
def server(request, exported_run, tmp_path_factory) -> Iterator[Server]:
    with _serving(exported_run.folder, request.param, tmp_path_factory.mktemp("uploads")) as serving:
        yield serving


@pytest.fixture
def one_server(exported_run, tmp_path) -> Iterator[Server]:
    names = {"names": frozenset({"localhost", "photos.example"}), "proxied": ["photos.example"]}
    with _serving(exported_run.folder, "pytorch", tmp_path, **names, origins=["https://friend.example"]) as serving:
        yield serving


def test_50_clients_at_once_get_evaluates_classes(server, exported_run):
    photos = list(exported_run.evaluated)
    photos *= -(-50 // len(photos))
    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda photo: server.classify(Path(photo).read_bytes()), photos))
    for photo, (status, answer) in zip(photos, answers, strict=True):
        name, confidence = exported_run.evaluated[photo]
        assert status == 200
        assert answer["class"] == answer["classes"][0]["class"] == name
        assert answer["confidence"] == pytest.approx(confidence, abs=0.02)
        assert answer["runner_up"] == answer["classes"][1]["class"] != name
        assert sum(row["confidence"] for row in answer["classes"]) == pytest.approx(1, abs=1e-4)
    assert not list(server.folder.iterdir())


@pytest.mark.parametrize("below", [0.0, 1.01])
def test_answers_below_the_threshold_are_unsure(exported_run, tmp_path, monkeypatch, below):
    unsure = {"wanted": 0.99, "below": below, "photos": 40, "kept": 30, "right": 30}
    facts = serve.describe(exported_run.folder) | {"unsure": unsure}
    monkeypatch.setattr(serve, "describe", lambda _: facts)
    with _serving(exported_run.folder, "pytorch", tmp_path) as serving:
        _, answer = serving.classify(Path(next(iter(exported_run.evaluated))).read_bytes())
        assert answer["unsure"] == (below > 1)
        assert json.loads(serving.ask("GET", "/model")[1])["unsure"] == unsure


def test_whatever_is_sent_is_answered(server):
    for name, specimen in ZOO.items():
        status, answer = server.classify(specimen.content)
        # A graph that resizes has not enough memory for all of a strip.
        if name in SOUND and not answer.get("error", "").startswith("too long"):
            assert (status, set(answer)) == (200, {"class", "confidence", "runner_up", "classes"}), name
            continue
        assert status == 400, name
        assert len(answer["message"]) > 10
        if name in FAULTY:
            assert answer["error"] == FAULTY[name].fault, name
        elif name in BROKEN_INSIDE:
            assert answer["error"] == "cannot be decoded", name
        else:
            assert name in ("1 x 5000.jpg", "1 x 5000.png", "5000 x 1.jpg", "5000 x 1.png")
    assert not list(server.folder.iterdir())


def test_a_photo_is_the_same_however_it_is_stored(one_server):
    def answer_for(content: bytes) -> float:
        status, answer = one_server.classify(content)
        assert status == 200
        return {row["class"]: row["confidence"] for row in answer["classes"]}[name]

    photo = picture(200, 300)
    _, answer = one_server.classify(encoded("PNG", photo=photo))
    name, upright = answer["class"], answer["confidence"]
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    data = Image.Exif()
    data[0x0112] = 6
    assert answer_for(encoded("PNG", photo=turned, exif=data)) == pytest.approx(upright, abs=1e-4)
    assert answer_for(encoded("TIFF", photo=photo)) == pytest.approx(upright, abs=1e-4)
    assert answer_for(encoded("JPEG", "CMYK", photo=photo, quality=98)) == pytest.approx(upright, abs=0.05)


def test_100_megabytes_are_refused_in_a_sentence_and_not_stored(one_server):
    largest = 0

    def chunks() -> Iterator[bytes]:
        nonlocal largest
        for _ in range(100):
            yield bytes(2**20)
            largest = max(largest, *(file.stat().st_size for file in one_server.folder.iterdir()), 0)

    for headers in ({"Content-Length": str(100 * 2**20)}, {}):  # and chunked, without a length
        status, answer = one_server.ask("POST", "/classify", chunks(), **headers)
        assert (status, json.loads(answer)) == (413, {"error": "too large", "message": "32 MB is the most."})
    assert largest <= serve.MAX_BYTES
    assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200
    assert not list(one_server.folder.iterdir())


def test_a_form_with_a_path_for_a_name_writes_nothing(one_server, tmp_path):
    photo = SOUND["baseline.jpg"].content
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="../../evil.jpg"\r\n\r\n' + photo + b"\r\n--x--"
    status, answer = one_server.ask("POST", "/classify", form, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 415
    assert "curl --data-binary @photo.jpg" in json.loads(answer)["message"]
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.html", "/classify/../../x"):
        assert one_server.ask("GET", path)[0] in (404, 405)
    assert one_server.ask("GET", "/classify")[0] == 405
    assert not list(one_server.folder.iterdir())
    assert not list(tmp_path.parent.glob("**/evil.jpg"))


def test_a_client_that_leaves_or_dawdles_is_let_go(one_server, monkeypatch):
    monkeypatch.setattr(serve, "_SECONDS", 0.5)
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nsome bytes"
    with socket.create_connection(("127.0.0.1", one_server.port)) as leaver:
        leaver.sendall(head)
    with socket.create_connection(("127.0.0.1", one_server.port)) as dawdler:
        dawdler.sendall(head)
        dawdler.settimeout(30)
        assert b" 408 " in dawdler.recv(200).splitlines()[0]
    monkeypatch.undo()
    assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200
    assert not list(one_server.folder.iterdir())


def test_an_upload_folder_that_is_full_or_was_removed(one_server):
    one_server.folder.rmdir()
    one_server.folder.touch()
    status, answer = one_server.classify(b"photo")
    assert (status, answer["error"]) == (507, "no room")
    one_server.folder.unlink()
    assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200
    assert one_server.folder.stat().st_mode & 0o777 == 0o700


def test_the_page_asks_for_nothing_from_elsewhere(one_server):
    connection = http.client.HTTPConnection("127.0.0.1", one_server.port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.headers["Content-Security-Policy"].startswith("default-src 'self' 'unsafe-inline';")
    assert not re.findall(r"(?:https?:)?//[a-z]", page)
    assert "innerHTML" not in page  # a file's name is text


def test_model_tells_classes_scores_and_limits(one_server, exported_run):
    status, answer = one_server.ask("GET", "/model")
    facts, description = json.loads(answer), json.loads((exported_run.folder / "model.json").read_text())
    assert status == 200
    assert facts["classes"] == description["classes"]
    assert facts["top1"] == pytest.approx(description["scores"]["val/top1"])
    assert facts["interval"][0] < facts["top1"] <= facts["interval"][1]
    assert facts["max_bytes"] == 32 * 2**20
    assert facts["test_flips"] is False


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "LOCALHOST.:1", "127.0.0.1:8000", "[::1]:8000", "photos.example")],
        *[(host, 421) for host in ("evil.example", "localhost.evil.example", "203.0.113.5", "[")],
    ],
)
def test_a_loopback_server_knows_its_own_names_alone(one_server, host, status):
    for method, path in (("GET", "/"), ("GET", "/model"), ("POST", "/classify")):
        body = SOUND["baseline.jpg"].content if method == "POST" else None
        assert one_server.ask(method, path, body, Host=host)[0] == status, path
    assert one_server.ask("GET", "/health", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"Origin": "http://localhost", "Host": "localhost"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:1"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "https://photos.example"}, True),  # behind a proxy that rewrites Host
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "https://friend.example:444", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "http://localhost:1234", "Host": "localhost"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://["}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
    ],
)
def test_another_website_is_refused(one_server, headers, is_own):
    photo = SOUND["baseline.jpg"].content
    told = [one_server.ask("POST", f"/classify{end}", photo, **headers) for end in ("", "%0A")]
    told += [one_server.ask("GET", f"/model{end}", **headers) for end in ("", "%0A")]
    assert [status for status, _ in told] == [200 if is_own else 403] * 4
    assert is_own or "--allow-origin" in json.loads(told[0][1])["message"]
    assert one_server.ask("GET", "/", **headers)[0] == 200  # a link to the page may stand anywhere


def test_an_allowed_origin_may_ask_and_read(one_server):
    connection = http.client.HTTPConnection("127.0.0.1", one_server.port)
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origin, allowed in (("https://friend.example", "https://friend.example"), ("https://evil.example", None)):
        for method, headers in (("OPTIONS", asking), ("POST", {})):
            connection.request(method, "/classify", SOUND["baseline.jpg"].content, {"Origin": origin, **headers})
            response = connection.getresponse()
            response.read()
            assert response.headers["Access-Control-Allow-Origin"] == allowed
            assert (response.status == 200) == bool(allowed)
    connection.close()


def test_a_prefix_is_taken_off_by_the_proxy_or_not(exported_run, tmp_path):
    with _serving(exported_run.folder, "pytorch", tmp_path, prefix="/photos") as server:
        for path in ("/", "/model", "/health"):
            assert server.ask("GET", path)[0] == server.ask("GET", "/photos" + path)[0] == 200
        assert server.ask("POST", "/photos/classify", SOUND["baseline.jpg"].content)[0] == 200
        assert server.ask("GET", "/photos")[0] == 307
        assert server.ask("GET", "/photos/model", Host="evil.example")[0] == 421


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
def test_all_addresses_of_ipv6_are_those_of_ipv4_too():
    with serve._listen("::", 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()


# Clients that only hold what others need


def _hold(server: Server, content: bytes, times: int = 1) -> list[socket.socket]:
    held = []
    for _ in range(times):
        held.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        held[-1].sendall(content)
    return held


def test_heads_and_answers_have_their_time(one_server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    half = b"GET /health HTTP/1.1\r\nHost: local"
    whole = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    (half_head,), (silent,), (kept,), (unread,) = (_hold(one_server, sent) for sent in (half, b"", whole, whole * 2000))
    with suppress(OSError):  # a byte now and then holds nothing
        for _ in range(600):
            half_head.sendall(b"x")
            time.sleep(0.1)
        pytest.fail("half a head was held for a minute")
    assert silent.recv(1) == b""
    while kept.recv(1 << 16):
        pass
    time.sleep(0.7)
    with suppress(OSError):
        while unread.recv(1 << 16):
            pass
    assert one_server.ask("GET", "/health")[0] == 200
    for connection in (half_head, silent, kept, unread):
        connection.close()


def test_health_tells_busy_from_dead(one_server, monkeypatch):
    monkeypatch.setattr(decoding, "WAITING", 0)
    status, answer = one_server.ask("GET", "/health")
    assert (status, json.loads(answer)) == (503, {"state": "busy"})
    monkeypatch.undo()
    assert one_server.ask("GET", "/health")[0] == 200


def test_idle_connections_are_closed_for_new_ones(one_server, monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 8)
    upload = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nsome"
    held = _hold(one_server, b"GET / HT", 12) + _hold(one_server, upload, 12)
    for _ in range(3):
        assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200
        assert json.loads(one_server.ask("GET", "/health")[1]) == {"state": "ok"}
    held[0].settimeout(5)
    with suppress(OSError):
        assert held[0].recv(1) == b""  # the oldest
    for connection in held:
        connection.close()


def test_uploads_are_bounded_in_all_and_for_each_address(exported_run, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_STORED", 2**20)
    with _serving(exported_run.folder, "pytorch", tmp_path) as server:
        head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        held = _hold(server, head + bytes(400_000))
        deadline = time.monotonic() + 20
        while not (file := next(server.folder.iterdir(), None)) or not file.stat().st_size > 300_000:
            assert time.monotonic() < deadline
        status, answer = server.classify(bytes(500_000))
        assert (status, answer["error"]) == (503, "busy")
        held[0].close()
        while list(server.folder.iterdir()):
            assert time.monotonic() < deadline
        assert server.classify(SOUND["baseline.jpg"].content)[0] == 200


def test_a_costly_photo_is_ended_and_stops_nobody(exported_run, tmp_path, monkeypatch):
    """What counts is a processor's time: a third of what the costly photo needs on this machine."""
    photo = encoded(photo=_large(), progressive=True)
    (tmp_path / "photo").write_bytes(photo)
    started = time.process_time()
    pixels_of_file(str(tmp_path / "photo"), Preprocess(72, 64, (0.5,) * 3, (0.5,) * 3), whole=False)
    monkeypatch.setattr(decoding, "SECONDS", (time.process_time() - started) / 3)
    monkeypatch.setattr(decoding, "WALL_SECONDS", 300.0)
    (tmp_path / "photo").unlink()
    with _serving(exported_run.folder, "pytorch", tmp_path) as server:
        with ThreadPoolExecutor(4) as clients:
            costly = [clients.submit(server.classify, photo) for _ in range(3)]
            while not any(job.is_heavy for job in list(server.decoders._running)):
                time.sleep(0.01)
            assert server.classify(SOUND["baseline.jpg"].content)[0] == 200
            assert not all(answer.done() for answer in costly)
            for answer in costly:
                status, told = answer.result()
                assert (status, told["error"]) == (400, "too costly to decode")
        assert server.classify(SOUND["baseline.jpg"].content)[0] == 200
    assert not list(tmp_path.iterdir())


@functools.cache
def _large() -> Image.Image:
    return picture(500, 500).resize((7900, 7900))


def test_a_worker_that_is_killed_or_full_or_dead_is_replaced(tmp_path):
    preprocess = Preprocess(72, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    photo = tmp_path / "photo"
    photo.write_bytes(SOUND["baseline.jpg"].content)
    workers = decoding.Decoders(preprocess, lambda path, found: found, whole=False, workers=2)
    try:
        expected = pixels_of_file(str(photo), preprocess, whole=False)
        for _ in range(3):
            np.testing.assert_array_equal(workers.submit(str(photo), "a").result(30), expected)
            for worker in workers._workers:
                worker._process.kill()
                worker._process.wait()
        assert workers.submit(str(tmp_path / "gone"), "a").result(30) == "missing"
    finally:
        workers.close()
    with pytest.raises(decoding.Busy):
        workers.submit(str(photo), "a")


def test_a_worker_that_stands_still_is_ended(tmp_path, monkeypatch):
    photo = tmp_path / "photo"
    photo.write_bytes(SOUND["baseline.jpg"].content)
    preprocess = Preprocess(72, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    workers = decoding.Decoders(preprocess, lambda path, found: found, whole=False, workers=2)
    try:
        monkeypatch.setattr(decoding, "WALL_SECONDS", 0.5)
        for worker in workers._workers:
            worker._process.send_signal(signal.SIGSTOP)
        assert workers.submit(str(photo), "a").result(60) == "too costly to decode"
        monkeypatch.undo()
        for worker in workers._workers:  # the other one
            worker._process.send_signal(signal.SIGCONT)
        assert workers.submit(str(photo), "a").result(60).shape == (64, 64, 3)
    finally:
        workers.close()


def test_those_who_asked_for_little_come_first():
    workers = object.__new__(decoding.Decoders)
    workers._turn, workers._closed, workers._workers = threading.Condition(), False, [None] * 3
    workers._spent = {"greedy": (5.0, time.monotonic())}
    jobs = [decoding._Job("", "greedy", number, print) for number in range(4)]
    jobs += [decoding._Job("", "new", 4, print, pixels=20_000_000), decoding._Job("", "new", 5, print, pixels=1000)]
    workers._waiting, workers._running = list(jobs), []
    assert [workers._take() for _ in range(3)] == [jobs[5], jobs[4], jobs[0]]
    assert not any(map(workers._may_run, jobs[1:4]))  # one worker is free for somebody else
    workers._waiting.append(decoding._Job("", "newer", 6, print))
    assert workers._take().address == "newer"


# The command itself


@contextmanager
def _command(run: Path, temporary: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, Server]]:
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, str(ROOT / "deploy" / "serve.py"), str(run), "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=temporary
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert match, line
        yield process, Server(int(match[1]), temporary)
    finally:
        process.kill()
        process.communicate()


def test_memory_is_bounded_and_the_end_is_clean(exported_run, tmp_path):
    large = encoded("PNG", photo=picture(100, 100).resize((6000, 5000)), compress_level=1)
    bomb, photo = FAULTY["bomb.png"].content, SOUND["baseline.jpg"].content
    with _command(exported_run.folder, tmp_path, "--weights", "onnx") as (process, server):
        assert [server.classify(large)[0] for _ in range(2)] == [200, 200]
        alone = _peak_memory(process.pid)
        with ThreadPoolExecutor(50) as clients:
            bodies = [large] * 4 + [bomb] * 20 + [bytes(10 * 2**20)] * 16 + [photo] * 10
            statuses = [status for status, _ in clients.map(server.classify, bodies)]
        assert statuses == [200] * 4 + [400] * 36 + [200] * 10
        # A second photo of 30 million pixels, opened at the same time, would take 360 MB and more.
        assert _peak_memory(process.pid) - alone < 250 * 2**20
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert not list(tmp_path.iterdir())


def test_a_request_to_end_is_obeyed_while_it_decodes(exported_run, tmp_path):
    photo = encoded(photo=_large(), progressive=True)
    with _command(exported_run.folder, tmp_path) as (process, server), ThreadPoolExecutor(9) as clients:
        begun = max(worker.cpu_times().user for worker in psutil.Process(process.pid).children())
        asked = [clients.submit(_whatever_comes, server, photo) for _ in range(8)]
        slow = _hold(server, b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nsome bytes")
        workers = psutil.Process(process.pid).children()
        while max(worker.cpu_times().user for worker in workers) < 0.2 + begun:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - started < 10  # 0.3 on a machine that does nothing else
        assert (process.returncode, out, err) == (0, "stopped\n", "")
        assert {answer.result() for answer in asked} & {503, None}
        slow[0].close()
    assert not list(tmp_path.iterdir())


def _whatever_comes(server: Server, photo: bytes) -> int | None:
    try:
        return server.classify(photo)[0]
    except (OSError, http.client.HTTPException):
        return None


def _peak_memory(pid: int) -> int:
    """The most bytes that a process has held so far; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


def test_a_mistake_is_one_line(exported_run, run_here, tmp_path):
    taken = serve._listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    stale = tmp_path / "stale"
    shutil.copytree(exported_run.folder, stale)
    weights = torch.load(stale / "best.pt", weights_only=True)
    torch.save({name: value.clone() + 1 for name, value in weights.items()}, stale / "best.pt")
    mistakes = {
        (tmp_path,): "model.json cannot be read",
        (exported_run.folder, "--port", port): f"cannot listen on 127.0.0.1, port {port}",
        (exported_run.folder, "--port", 99_999): "cannot listen on 127.0.0.1, port 99999",
        (exported_run.folder, "--weights", "tf"): "--help",
        (exported_run.folder, "--allow-origin", "https://x.org/"): "--allow-origin https://x.org/: an origin is scheme",
        (exported_run.folder, "--allow-origin", "http://["): "--allow-origin http://[: an origin is scheme",
        (stale, "--weights", "onnx"): "was made of other weights than best.pt: make it anew, `python deploy/export.py",
    }
    for arguments, told in mistakes.items():
        done = run_here(serve, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert told in done.stderr.splitlines()[-1], arguments
    taken.close()


def test_an_answer_is_explained_where_that_is_asked_for(server, exported_run):
    photo = next(iter(exported_run.evaluated))
    body = Path(photo).read_bytes()
    model = json.loads(server.ask("GET", "/model")[1])
    status, plain = server.classify(body)
    assert "explanation" not in plain
    status, told = server.ask("POST", "/classify?explain=1", body)
    answer = json.loads(told)
    if not model["explain"]:  # the ONNX graph
        assert (status, answer["error"]) == (400, "no explanation")
    else:
        kind, _, content = answer.pop("explanation").partition(",")
        assert (status, answer, kind) == (200, plain, "data:image/jpeg;base64")
        preprocess = open_run(exported_run.folder, torch.device("cpu")).preprocess
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.size == (preprocess.image_size,) * 2
        assert (
            json.loads(server.ask("POST", "/classify?explain=1", b"no photo")[1])["error"]
            == "not an image of a known format"
        )
    status, told = server.ask("POST", "/classify?explain=yes", body)
    assert (status, json.loads(told)["error"]) == (400, "no such value")
    assert not list(server.folder.iterdir())


# The page in a browser


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("shape", ["page", "page-phone"])
def test_a_person_gives_photos_and_reads_their_classes(exported_run, one_server, tmp_path, shape):
    from playwright.sync_api import sync_playwright

    global _watched
    photos = list(exported_run.evaluated)
    photos = [photos[0], photos[len(photos) // 2], photos[-1]]
    bad = tmp_path.parent / "holiday notes.jpg"
    bad.write_bytes(FAULTY["text.jpg"].content)
    asked: list[str] = []
    errors: list[str] = []
    _watched = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        phone = {**driver.devices["Pixel 7"], "device_scale_factor": 1.5}
        screen = phone if shape == "page-phone" else {"viewport": {"width": 1100, "height": 690}}
        page = browser.new_context(**screen).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        _watched.clear()  # the driver's own
        page.goto(f"http://127.0.0.1:{one_server.port}/")
        assert page.get_by_text("Take a photo").is_visible() == (shape == "page-phone")
        page.locator("#choose").set_input_files([*photos, str(bad)])
        page.get_by_text("4 photos", exact=True).wait_for()
        cards = page.locator(".card")
        for index, photo in enumerate(photos):
            name, confidence = exported_run.evaluated[photo]
            assert cards.nth(index).locator(".answer").inner_text() == name
            assert cards.nth(index).locator(".file").inner_text() == Path(photo).name
            bar = cards.nth(index).locator(".bar").first
            assert bar.inner_text().split() == [name, f"{100 * confidence:.1f}", "%"]
        assert "no JPEG" in cards.nth(3).locator(".answer").inner_text()
        assert "error" in (cards.nth(3).get_attribute("class") or "")
        page.wait_for_timeout(300)  # the pictures appear
        folder = Path(os.environ.get("DALITUNE_SCREENSHOTS") or tmp_path.parent)
        page.screenshot(path=folder / f"{shape}.jpg", quality=80)  # photos: a PNG would be four times as large
        bars = page.locator(".bar").count()
        page.get_by_text("Show where in a photo it finds its answer").click()
        page.locator(".has-heat").nth(2).wait_for()
        page.wait_for_timeout(300)
        assert page.locator(".heat:visible").count() == 3
        assert page.locator(".photo:visible").count() == 0
        assert page.evaluate("[...document.querySelectorAll('.heat')].every(each => each.naturalWidth > 0)")
        assert page.locator(".bar").count() == bars, "an answer that is asked for again stands once"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=tmp_path.parent / f"{shape}-explained.jpg", quality=80)
        page.get_by_text("Show where in a photo it finds its answer").click()
        assert page.locator(".photo:visible").count() == 3
        page.get_by_text("Clear").click()
        assert cards.count() == 0
        drop = page.evaluate_handle(
            "bytes => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], 'x.jpg'));"
            "  return data; }",
            list(Path(photos[0]).read_bytes()),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": drop})
        page.get_by_text("1 photo", exact=True).wait_for()
        page.evaluate("data => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))", drop)
        page.get_by_text("2 photos", exact=True).wait_for()
        first = exported_run.evaluated[photos[0]][0]
        assert page.locator(".answer").all_inner_texts() == [first, first]

        # Switched on while a photo waits for its answer, which it was asked for without a map.
        page.get_by_text("Clear").click()
        held: list[Any] = []
        page.route(re.compile("/classify$"), lambda route: held.append(route))
        page.locator("#choose").set_input_files(photos[0])
        for _ in range(500):
            if not held:
                page.wait_for_timeout(20)
        page.get_by_text("Show where in a photo it finds its answer").click()
        held[0].continue_()
        page.locator(".has-heat").wait_for()
        page.get_by_text("1 photo", exact=True).wait_for()

        # A second question that fails leaves the answer to the first.
        page.get_by_text("Clear").click()
        page.get_by_text("Show where in a photo it finds its answer").click()
        page.unroute_all()
        page.route(re.compile("explain=1$"), lambda route: route.abort())
        page.locator("#choose").set_input_files(photos[0])
        page.get_by_text("1 photo", exact=True).wait_for()
        with page.expect_event("requestfailed"):
            page.get_by_text("Show where in a photo it finds its answer").click()
        page.get_by_text("1 photo", exact=True).wait_for()
        assert (cards.get_attribute("class") or "").split() == ["card"]
        assert page.locator(".answer").inner_text() == first
        page.unroute_all()
        for _ in range(2):  # off and on: it is asked again
            page.get_by_text("Show where in a photo it finds its answer").click()
        page.locator(".has-heat").wait_for()
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((f"http://127.0.0.1:{one_server.port}/", "blob:", "data:"))]
    assert (elsewhere, errors) == ([], [])
    assert _watched == []  # the server connected to nobody
    _watched = None

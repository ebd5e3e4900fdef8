"""The page and its endpoint: evaluate.py's answers, whatever is sent, and nothing from or to elsewhere."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy import serve
from pipelines.inference import open_onnx, open_run
from tests.corpus import BROKEN_INSIDE, FAULTY, SOUND, ZOO, encoded, picture

import pytest
import torch
import uvicorn
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(serve.__file__).resolve().parent.parent
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
def _serving(run: Path, weights: str, folder: Path) -> Iterator[Server]:
    classifier = open_onnx(run / "export" / "model.onnx") if weights == "onnx" else open_run(run, torch.device("cpu"))
    app = serve.make_app(classifier, serve.describe(run), folder)
    listener = serve._listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname()[1], folder)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=["pytorch", "onnx"])
def server(request, exported_run, tmp_path_factory) -> Iterator[Server]:
    with _serving(exported_run.folder, request.param, tmp_path_factory.mktemp("uploads")) as serving:
        yield serving


@pytest.fixture
def one_server(exported_run, tmp_path) -> Iterator[Server]:
    with _serving(exported_run.folder, "pytorch", tmp_path) as serving:
        yield serving


def test_every_validation_photo_has_evaluates_class_from_50_clients_at_once(server, exported_run):
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


def test_whatever_is_sent_is_answered(server):
    for name, specimen in ZOO.items():
        status, answer = server.classify(specimen.content)
        # A graph that resizes has no room for all of a strip.
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
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nsome bytes"
    with socket.create_connection(("127.0.0.1", one_server.port)) as leaver:
        leaver.sendall(head)
    with socket.create_connection(("127.0.0.1", one_server.port)) as dawdler:
        dawdler.sendall(head)
        dawdler.settimeout(30)
        assert b" 408 " in dawdler.recv(200).splitlines()[0]
    assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200
    assert not list(one_server.folder.iterdir())


def test_a_folder_that_takes_nothing_is_an_answer(one_server):
    away = one_server.folder.with_name("away")
    one_server.folder.rename(away)
    status, answer = one_server.classify(b"photo")
    assert (status, answer["error"]) == (507, "no room")
    away.rename(one_server.folder)
    assert one_server.classify(SOUND["baseline.jpg"].content)[0] == 200


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


# The command itself


@contextmanager
def _command(run: Path, temporary: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, Server]]:
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, str(ROOT / "deploy" / "serve.py"), str(run), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=temporary)
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
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "stopped\n")
    assert not list(tmp_path.iterdir())


def _peak_memory(pid: int) -> int:
    """The most bytes that a process has held so far; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


def test_a_mistake_is_one_line(exported_run, run_here, tmp_path):
    taken = serve._listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    mistakes = {
        (tmp_path,): "model.json cannot be read",
        (exported_run.folder, "--port", port): f"cannot listen on 127.0.0.1, port {port}",
        (exported_run.folder, "--port", 99_999): "cannot listen on 127.0.0.1, port 99999",
        (exported_run.folder, "--weights", "tf"): "--help",
    }
    for arguments, told in mistakes.items():
        done = run_here(serve, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert told in done.stderr.splitlines()[-1], arguments
    taken.close()


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
        for place, photo in enumerate(photos):
            name, confidence = exported_run.evaluated[photo]
            assert cards.nth(place).locator(".answer").inner_text() == name
            assert cards.nth(place).locator(".file").inner_text() == Path(photo).name
            bar = cards.nth(place).locator(".bar").first
            assert bar.inner_text().split() == [name, f"{100 * confidence:.1f}", "%"]
        assert "no JPEG" in cards.nth(3).locator(".answer").inner_text()
        assert "error" in (cards.nth(3).get_attribute("class") or "")
        page.wait_for_timeout(300)  # the pictures appear
        folder = Path(os.environ.get("DALITUNE_SCREENSHOTS") or tmp_path.parent)
        page.screenshot(path=folder / f"{shape}.jpg", quality=80)  # photos: a PNG would be four times as large
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
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((f"http://127.0.0.1:{one_server.port}/", "blob:", "data:"))]
    assert (elsewhere, errors) == ([], [])
    assert _watched == []  # the server connected to nobody
    _watched = None

"""Photos for people who have none: the download against a real server on this machine, the drawn shapes, `data`."""

import hashlib
import io
import os
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipelines.data import samples as photos
from pipelines.errors import MachineError, UserError

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

COUNTS = {"train/ants": 3, "train/bees": 2, "val/ants": 1, "val/bees": 2}


def archive(counts: dict[str, int], extra: tuple[zipfile.ZipInfo | str, ...] = ()) -> bytes:
    """A zip file laid out as the tutorial's: its one folder, and a GIF that nobody counts."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for folder, count in counts.items():
            for number in range(count):
                packed.writestr(f"hymenoptera_data/{folder}/{number}.{'JPG' if number else 'jpeg'}", bytes(1000))
        packed.writestr("hymenoptera_data/train/ants/imageNotFound.gif", b"GIF89a")
        for entry in extra:
            packed.writestr(entry, "../../elsewhere")
    return content.getvalue()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """serve(body, length=None) -> the URL of a server that states `length` (or the true one) and sends `body`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(photos, "HYMENOPTERA_PHOTOS", COUNTS)
    servers = []

    def start(body: bytes, length: int | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/photos.zip":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        monkeypatch.setattr(photos, "HYMENOPTERA_SHA256", hashlib.sha256(body).hexdigest())
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/photos.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_refused(cache: Path, url: str, reason: str) -> None:
    """One line that says what, from where, why and what does without; and nothing left behind."""
    with pytest.raises(MachineError) as caught:
        photos.hymenoptera(cache, url)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("ants-and-bees", url, reason, "--data DIR", "DALITUNE_DATA"):
        assert part in message
    assert list(cache.iterdir()) == []


def test_download_once(tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "new" / "cache"
    url = serve(archive(COUNTS))
    root = photos.hymenoptera(cache, url)
    assert root == cache / "hymenoptera_data"
    assert list(cache.iterdir()) == [root]
    for split in ("train", "val"):
        found = ImageFolder(root / split)
        assert found.classes == ["ants", "bees"]
        assert np.bincount(found.targets).tolist() == [COUNTS[f"{split}/{name}"] for name in found.classes]
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == f"downloading the ants-and-bees photos from {url}\n"

    assert photos.hymenoptera(cache, "http://127.0.0.1:1/gone") == root
    assert capfd.readouterr().err == ""


def test_an_archive_that_is_not_the_tutorials_is_never_unpacked(tmp_path, serve, monkeypatch) -> None:
    url = serve(archive(COUNTS))
    monkeypatch.setattr(photos, "HYMENOPTERA_SHA256", "0" * 64)
    monkeypatch.setattr(photos, "_unpack", None)
    assert_refused(tmp_path, url, "its SHA-256 is ")


def test_another_process_was_faster(tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(archive(COUNTS))
    unpack = photos._unpack

    def slow(file: Path, folder: Path) -> None:
        unpack(file, folder)
        unpack(file, tmp_path)

    monkeypatch.setattr(photos, "_unpack", slow)
    assert photos.hymenoptera(tmp_path, url) == tmp_path / "hymenoptera_data"
    assert [path.name for path in tmp_path.iterdir()] == ["hymenoptera_data"]


def test_real_photos_are_complete() -> None:
    root = Path(os.environ.get("DALITUNE_DATA", ""))
    if root.name != "hymenoptera_data":
        pytest.skip("DALITUNE_DATA does not name the folder hymenoptera_data")
    assert photos.hymenoptera(root.parent, "http://127.0.0.1:1/gone") == root


def test_incomplete_folder_is_neither_taken_nor_deleted(tmp_path: Path) -> None:
    photo = tmp_path / "hymenoptera_data" / "train" / "ants" / "mine.jpg"
    photo.parent.mkdir(parents=True)
    photo.touch()
    with pytest.raises(MachineError, match=r"hymenoptera_data holds the photos \{'train/ants': 1\}, not .*delete"):
        photos.hymenoptera(tmp_path)
    assert photo.exists()


@pytest.mark.parametrize("counts", [{}, COUNTS | {"val/bees": 1}, COUNTS | {"val/wasps": 1}])
def test_wrong_counts(tmp_path: Path, serve: Callable[..., str], counts: dict[str, int]) -> None:
    assert_refused(tmp_path, serve(archive(counts)), "not {'train/ants': 3, 'train/bees': 2,")


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        "../escaped.jpg",
        "hymenoptera_data/../../escaped.jpg",
        "/escaped.jpg",
        "..\\escaped.jpg",
        "C:\\escaped.jpg",
        link("hymenoptera_data/train/wasps"),
    ],
)
def test_entry_that_leads_elsewhere(tmp_path: Path, serve: Callable[..., str], entry: zipfile.ZipInfo | str) -> None:
    (tmp_path / "cache").mkdir()
    assert_refused(tmp_path / "cache", serve(archive(COUNTS, (entry,))), "leads out of the folder")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_limits(tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    body = archive(COUNTS)
    url = serve(body)
    monkeypatch.setattr(photos, "MAX_ENTRIES", 8)
    assert_refused(tmp_path, url, "more than 8 entries")
    monkeypatch.setattr(photos, "MAX_ENTRIES", 9)
    # 8 photos of 1,000 bytes and 6 bytes of GIF, which deflate to far less.
    assert len(body) < 8005
    monkeypatch.setattr(photos, "MAX_BYTES", 8005)
    assert_refused(tmp_path, url, "entries or 8,005 bytes")
    monkeypatch.setattr(photos, "MAX_BYTES", len(body) - 1)
    assert_refused(tmp_path, url, f"more than {len(body) - 1:,} bytes")
    monkeypatch.setattr(photos, "MAX_BYTES", 8006)
    photos.hymenoptera(tmp_path, url)


def test_broken_downloads(tmp_path: Path, serve: Callable[..., str]) -> None:
    body = archive(COUNTS)
    assert_refused(tmp_path, serve(body[:-100], length=len(body)), f"{len(body) - 100:,} of {len(body):,} bytes")
    assert_refused(tmp_path, serve(body[:-100]), "not a zip file")
    assert_refused(tmp_path, serve(b"<html>\nlog in first</html>"), "not a zip file")
    first = 30 + len("hymenoptera_data/train/ants/0.jpeg")  # after the local header: the first photo's content
    assert_refused(tmp_path, serve(body[:first] + bytes(5) + body[first + 5 :]), "(")
    assert_refused(tmp_path, serve(body).replace("photos.zip", "moved.zip"), "404")


def test_no_network(tmp_path: Path, serve: Callable[..., str]) -> None:
    # A port that was ours a moment ago, and that nobody serves.
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    assert_refused(tmp_path, f"http://127.0.0.1:{port}/photos.zip", "refused")
    assert_refused(tmp_path, "no address", "unknown url type")


def test_silent_server(tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "TIMEOUT", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        # It listens, and never answers.
        assert_refused(tmp_path, f"http://127.0.0.1:{server.server_port}/photos.zip", "timed out")


def test_interrupt_leaves_nothing(tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = photos._unpack

    def interrupted(file: Path, folder: Path) -> None:
        unpack(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(photos, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        photos.hymenoptera(tmp_path, serve(archive(COUNTS)))
    assert list(tmp_path.iterdir()) == []


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos.shapes(tmp_path_factory.mktemp("cache"))


def test_shapes_are_complete(drawn: Path) -> None:
    assert [path.name for path in drawn.parent.iterdir()] == ["shapes-v1"]
    for split, count in (("train", 100), ("val", 30)):
        found = ImageFolder(drawn / split)
        assert found.classes == ["circle", "square", "star", "triangle"]
        assert np.bincount(found.targets).tolist() == [count] * 4
    sizes = set()
    for path in drawn.rglob("*.jpg"):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            sizes.add(picture.size)
    assert len(sizes) > 100
    assert all(90 <= side <= 200 for size in sizes for side in size)
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_shapes_are_the_same_again(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = digest(drawn)
    assert len(set(pictures.values())) == len(pictures) == 520
    np.random.seed(1)  # noqa: NPY002
    # A picture depends on its split, class and number alone: with fewer a class, these few are the same.
    monkeypatch.setattr(photos, "SHAPES_PER_CLASS", {"train": 4, "val": 3})
    fewer = digest(photos.shapes(tmp_path))
    assert len(fewer) == 28
    assert fewer.items() <= pictures.items()


def test_shapes_are_drawn_once(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(photos, "_picture", no_more)
    assert photos.shapes(drawn.parent) == drawn


def test_shapes_need_more_than_a_linear_classifier(drawn: Path) -> None:
    def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
        found = ImageFolder(drawn / split)
        small = [np.asarray(picture.resize((24, 24))).ravel() / 127.5 - 1 for picture, _ in found]
        return np.array(small), np.array(found.targets)

    (train, labels), (val, truth) = pixels("train"), pixels("val")
    targets = np.eye(4)[labels] - 0.25
    for ridge in (1, 10, 100, 1000):
        # Ridge regression in its dual form: 400 photos are fewer than the pixels.
        weights = train.T @ np.linalg.solve(train @ train.T + ridge * np.eye(len(train)), targets)
        assert np.mean((val @ weights).argmax(axis=1) == truth) < 0.6


def test_unwritable_folder_for_shapes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="DALITUNE_CACHE"):
        photos.shapes(tmp_path / "file")


def test_locate_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "photos.csv"
    table.touch()
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DALITUNE_DATA", "/nowhere")
    assert photos.locate(str(table), tmp_path) == table
    assert photos.locate("photos.csv", tmp_path) == Path("photos.csv")
    assert photos.locate("~/photos.csv", tmp_path) == table
    assert photos.locate("./shapes", tmp_path) == Path("shapes")


@pytest.mark.parametrize("data", ["nowhere", "", "~nobody-of-that-name/photos", "nul\0", "long" * 1000])
def test_locate_missing_path(tmp_path: Path, data: str) -> None:
    with pytest.raises(
        UserError, match=r"^data: there is no .*ROOT/<split>/<class>/\*.*path,label\[,split\]"
    ) as caught:
        photos.locate(data, tmp_path)
    assert "\n" not in str(caught.value)


def test_locate_shapes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert photos.locate("shapes", drawn.parent) == drawn


def test_locate_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for given in (str(tmp_path / "mine"), "~/mine"):
        monkeypatch.setenv("DALITUNE_DATA", given)
        assert photos.locate(None, tmp_path) == tmp_path / "mine"
    (tmp_path / "file").touch()
    for given in (str(tmp_path / "nowhere"), str(tmp_path / "file")):
        monkeypatch.setenv("DALITUNE_DATA", given)
        with pytest.raises(UserError, match=rf"^DALITUNE_DATA is '{given}'"):
            photos.locate(None, tmp_path)


@pytest.mark.parametrize("given", [None, ""])
def test_locate_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.delenv("DALITUNE_DATA", raising=False)
    if given is not None:
        monkeypatch.setenv("DALITUNE_DATA", given)
    monkeypatch.setattr(photos, "hymenoptera", lambda cache: cache / "ants and bees")
    assert photos.locate(None, tmp_path) == tmp_path / "ants and bees"

"""Asks the page about one photo, again and again, while others do to it what they should not.

    python benchmarks/serve.py runs/NAME --seconds 60
    python benchmarks/serve.py runs/NAME --attacks heads readers --photo photo.jpg

First alone, then under each attack that is asked for at once: 50 uploads of 32 MB, half heads on more connections than
the server keeps, bodies of a byte a second, photos that take long to decode, readers of a byte a second, and 4 more
uploads that keep a temporary disk of 64 MB full (a tmpfs, which only root may mount; else it is left out). The
attackers are a process of their own and, on Linux, come from other addresses (127.0.0.2 and on) than who asks.
"""

import argparse
import asyncio
import http.client
import io
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
UPLOADS, HEADS, BODIES, COSTLY, READERS, FILLERS = 50, 600, 100, 8, 100, 4  # connections at a time
DISK = "size=64m"
POST = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def drawn(width: int, height: int, noise: int = 12, **options: Any) -> bytes:
    """A JPEG of coarse noise under fine noise of so many grey levels, as large as a photo's."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    if noise:
        fine = np.asarray(coarse).astype(np.int16) + rng.integers(-noise, noise + 1, (height, width, 1), dtype=np.int16)
        coarse = Image.fromarray(fine.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    coarse.save(file, "JPEG", quality=88, **options)
    return file.getvalue()


def costly_photo() -> bytes:
    """A progressive JPEG of 62 million pixels whose last scan stands in it again and again."""
    photo = drawn(7900, 7900, noise=0, progressive=True)
    last = photo.rindex(b"\xff\xda")
    return photo[:last] + photo[last:-2] * 40 + photo[-2:]


async def _answer(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()
    return line.split()[1].decode() if line else "broken off"


async def _upload(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, photo: bytes) -> str:
    writer.write(POST % (32 * 2**20))
    writer.write(photo)  # what stands behind a photo's end does no harm, and is stored
    for _ in range(31):
        writer.write(bytes(2**20))
        await writer.drain()
    writer.write(bytes(32 * 2**20 - len(photo) - 31 * 2**20))
    return await _answer(reader)


async def _half_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: bytes) -> str:
    writer.write(b"GET /health HTTP/1.1\r\nHost: local")
    return await _answer(reader)


async def _slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, photo: bytes) -> str:
    writer.write(POST % len(photo))
    for at in range(len(photo)):
        writer.write(photo[at : at + 1])
        await writer.drain()
        with suppress(TimeoutError, asyncio.TimeoutError):
            return await asyncio.wait_for(_answer(reader), 1)
    return "whole"


async def _costly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, photo: bytes) -> str:
    writer.write(POST % len(photo) + photo)
    return await _answer(reader)


async def _slow_reader(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: bytes) -> str:
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    while await reader.read(1):
        await asyncio.sleep(1)
    return "broken off"


ATTACKS: dict[str, tuple[int, Callable[..., Awaitable[str]]]] = {
    "uploads": (UPLOADS, _upload),
    "heads": (HEADS, _half_head),
    "bodies": (BODIES, _slow_body),
    "costly": (COSTLY, _costly),
    "readers": (READERS, _slow_reader),
    "disk": (FILLERS, _upload),
}


def attack(port: int, names: list[str], seconds: float, seen: Any) -> None:
    """Keeps all connections of the attacks open, each anew a second after its end.

    Says in `seen` that they begin, and what they got.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 4096, hard))
    photo, costly = drawn(800, 600), costly_photo()
    until = time.time() + seconds
    seen.put("begin")
    got: Counter[tuple[str, str]] = Counter()

    async def one(name: str, address: str) -> None:
        work = ATTACKS[name][1]
        while time.time() < until:
            writer = None
            try:
                local = (address, 0) if sys.platform == "linux" else None
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=local, limit=2**16)
                got[name, await work(reader, writer, costly if name == "costly" else photo)] += 1
            except OSError:
                got[name, "broken off"] += 1
            finally:
                if writer:
                    writer.close()
                await asyncio.sleep(1)

    async def all_of_them() -> None:
        tasks = [
            asyncio.ensure_future(one(name, f"127.0.0.{2 + list(ATTACKS).index(name)}"))
            for name in names
            for _ in range(ATTACKS[name][0])
        ]
        await asyncio.sleep(max(0, until - time.time()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    seen.put(dict(got))


def ask(port: int, photo: bytes, seconds: float) -> tuple[list[float], Counter[Any]]:
    """Seconds of each answer, and the statuses, over new connections; four a second at most."""
    times, statuses = [], Counter[Any]()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", "/classify", photo)
            response = connection.getresponse()
            response.read()
            statuses[response.status] += 1
        except OSError as error:
            statuses[type(error).__name__] += 1
        finally:
            connection.close()
        times.append(time.monotonic() - started)
        time.sleep(max(0.0, 0.25 - times[-1]))
    return times, statuses


@contextmanager
def small_disk(wanted: bool) -> Iterator[str | None]:
    """A small tmpfs; None where there can be none, which is said."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", folder]
        is_there = wanted and bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
        if wanted and not is_there:
            print("no small disk, which only root may mount: the disk is not filled")
        try:
            yield folder if is_there else None
        finally:
            if is_there:
                subprocess.run(["umount", "-l", folder], check=True)


def _told(name: str, times: list[float], statuses: Counter[Any]) -> None:
    each = ", ".join(f"{status}: {number}" for status, number in statuses.items())
    print(f"| {name} | {len(times)} | {each} | {statistics.median(times):.3f} | {max(times):.3f} |", flush=True)


def _memory(process: psutil.Process) -> int:
    total = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            total += one.memory_info().rss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--seconds", type=float, default=60, help="under attack; alone a sixth of it (default: 60)")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--photo", type=Path, help="(default: one is drawn, 2000 x 1500)")
    parser.add_argument("--weights", choices=("pytorch", "onnx"), default="pytorch")
    options = parser.parse_args()
    photo = options.photo.read_bytes() if options.photo else drawn(2000, 1500)
    command = [sys.executable, str(ROOT / "deploy/serve.py"), options.run, "--port", "0", "--weights", options.weights]
    with small_disk("disk" in options.attacks) as disk:
        if not disk:
            options.attacks = [name for name in options.attacks if name != "disk"]
        _measure(command, photo, options, disk)


def _measure(command: list[str], photo: bytes, options: argparse.Namespace, disk: str | None) -> None:
    environment = {**os.environ, **({"TMPDIR": disk} if disk else {})}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    context = multiprocessing.get_context("spawn")
    try:
        assert server.stdout is not None
        match = re.search(r":(\d+)/", server.stdout.readline())
        assert match, "the server has not started"
        port, process, seen = int(match[1]), psutil.Process(server.pid), context.Queue()
        print("| | asked | answers | median s | worst s |\n|---|---|---|---|---|")
        _told("alone", *ask(port, photo, options.seconds / 6))
        attackers = context.Process(target=attack, args=(port, options.attacks, options.seconds + 3, seen))
        attackers.start()
        seen.get(timeout=120)
        time.sleep(2)
        _told(" + ".join(options.attacks), *ask(port, photo, options.seconds))
        print(f"\nmemory of the server and its workers: {_memory(process) / 2**20:.0f} MB")
        got: Counter[tuple[str, str]] = Counter(seen.get(timeout=60))
        attackers.join()
        for (name, answer), number in sorted(got.items()):
            print(f"{name}: {answer} x {number}")
        _told("afterwards", *ask(port, photo, 5))
        started = time.monotonic()
        server.terminate()
        print(f"SIGTERM: ended with {server.wait(60)} in {time.monotonic() - started:.1f} s")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()

"""A web page for a trained run, and an endpoint for programs.

    python deploy/serve.py runs/NAME                  # http://127.0.0.1:8000, for this machine alone
    python deploy/serve.py runs/NAME --weights onnx   # the graph of deploy/export.py, without PyTorch's network
    python deploy/serve.py runs/NAME --unsure-for 0.99  # marks answers that a person should look at
    python deploy/serve.py runs/NAME --host 0.0.0.0   # for the network too, a phone say; there is no password

    curl --data-binary @photo.jpg http://127.0.0.1:8000/classify
    {"class": "bees", "confidence": 0.98, "runner_up": "ants", "classes": [{"class": "bees", "confidence": 0.98}, ...]}

    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/classify?explain=1'
    {..., "explanation": "data:image/jpeg;base64,..."}: a picture of where in the photo it finds its class (Grad-CAM)

A body is one photo's bytes. What is no photo is answered by `error`, one or two words, and `message`, a sentence, with
a status of 400 or above. `GET /model` tells classes, scores and limits, `GET /health` whether it is ok or busy. The
page loads nothing from elsewhere and the server asks nobody; a photo lies in a temporary folder until it is answered,
under a name of the server's own.
"""

import argparse
import asyncio
import base64
import errno
import io
import ipaddress
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed
    import pipelines.early_interrupt  # noqa: F401

from deploy.decoding import MAX_PIXELS, Busy, Decoders
from pipelines.config import ScriptParser
from pipelines.distributed.exits import Terminated, run_script
from pipelines.distributed.hardware import cpu_cores
from pipelines.errors import UserError
from pipelines.inference import (
    Answer,
    Classifier,
    answer_of,
    explainer,
    import_extra,
    open_onnx,
    open_run,
    unsure_below,
)
from pipelines.run.heat import laid_over
from pipelines.run.resume import spelled
from pipelines.run_files import read_description
from pipelines.text import printable
from pipelines.training.calibration import unsure_line
from pipelines.training.evaluation import wilson_interval

import numpy as np
import torch
from PIL import Image

Explain = Callable[[np.ndarray, Answer], np.ndarray]  # as `explainer` gives it

MAX_BYTES = 32 * 2**20  # of a photo
_STORED = 2 * 2**30  # bytes of all uploads, and at most half of what the disk has free
_SHARE = 0.75  # of it, for one address
_LITTLE = 1 / 16  # of it, which an address may store also where others fill it: there is as much again on the disk
_SECONDS, _GRACE, _RATE = (
    120,
    10,
    16 * 2**10,
)  # for one upload: seconds in all; seconds before its bytes per second count
_BUFFER = 256 * 2**10  # bytes of an upload in memory
_FILES = 4096  # open at a time, where the system allows it
_SHOWN = 5  # classes of an answer
_PAGE = Path(__file__).resolve().with_name("page.html")
_POLICY = "default-src 'self' 'unsafe-inline'; img-src blob: data:; base-uri 'none'; form-action 'none'"
_HOST = r"[\w-]+(?:\.[\w-]+)*\.?|\[[\da-f:.]+\]"  # a name, or an address
_PORTS = {"http": 80, "https": 443}
_PROXIES = "127.0.0.1,::1,::ffff:127.0.0.1"  # this machine, the last where a server listens by IPv6 and IPv4
_MESSAGES = {
    "empty file": "The file is empty.",
    "not an image of a known format": "This is no JPEG, PNG, WebP, AVIF, BMP, TIFF or PPM photo.",
    "HEIC, which needs pillow-heif": "This is a HEIC photo: save it as JPEG.",
    "broken header": "It begins like a photo, but its header is broken.",
    "truncated": "The photo is cut off: its file ends too early.",
    "damaged": "The photo is damaged.",
    "too costly to decode": "The photo would take too much time or memory to decode.",
    "too many pixels": f"The photo has more than {MAX_PIXELS // 10**6} million pixels. Make it smaller.",
}


def main(arguments: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM, which end it in the regular way. Raises UserError."""
    options = _parse(arguments)
    import_extra("uvicorn")
    import_extra("starlette")
    facts = describe(options.run)
    # One thread for each photo, and several photos at a time: the cores are not shared out twice.
    torch.set_num_threads(1)
    if options.weights == "onnx":
        classifier: Classifier = open_onnx(options.run / "export" / "model.onnx", made_of=options.run / "best.pt")
        if options.test_flips not in (None, classifier.test_flips):
            wanted = spelled(options.test_flips)
            raise UserError(f"--test-flips {wanted}: the graph was made otherwise: export.py --test-flips {wanted}")
    else:
        classifier = open_run(options.run, torch.device("cpu"), test_flips=options.test_flips)
    if unsure := unsure_below(options.run, options.unsure_for, test_flips=classifier.test_flips):
        facts["unsure"] = unsure
        print(unsure_line(unsure), flush=True)
    listener = _listen(options.host, options.port)
    names = _names(options.host, listener.getsockname()[0], options.allow_host)
    _allow_files()
    with tempfile.TemporaryDirectory(prefix="dalitune-") as folder, suppress(KeyboardInterrupt, Terminated):
        allowed = {"proxied": options.allow_host, "origins": options.allow_origin}
        server = make_server(classifier, facts, Path(folder), names=names, prefix=options.prefix, **allowed)
        address = _address(options.host, listener.getsockname()[1], options.prefix)
        mirrored = ", each photo with its mirror image" if classifier.test_flips else ""
        server.greeting = f"{facts['name']} ({options.weights}{mirrored}): {address}   Ctrl-C ends it"
        try:
            server.run(sockets=[listener])
        finally:
            server.decoders.close()
    print("stopped", flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("serve.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with best.pt and model.json")
    parser.add_argument("--weights", choices=("pytorch", "onnx"), default="pytorch", help="(default: pytorch)")
    parser.add_test_flips()
    parser.add_unsure_for()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument(
        *("--allow-host", "--allow_host"),
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="names that the server is called by, as behind a proxy; "
        "on 127.0.0.1 only localhost is one else, elsewhere any name",
    )
    parser.add_argument(
        *("--allow-origin", "--allow_origin"),
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="websites whose pages may ask too, such as https://photos.example (CORS)",
    )
    parser.add_argument("--prefix", default="", help="path below which a reverse proxy has it, such as /photos")
    options = parser.parse_args(arguments)
    options.host = options.host.strip("[]")
    options.allow_host = [_name_in(text) for text in options.allow_host]
    options.allow_origin = [_origin_in(text) for text in options.allow_origin]
    options.prefix = "/" + options.prefix.strip("/") if options.prefix.strip("/") else ""
    return options


def _name_in(text: str) -> str:
    """A value of --allow-host without its port, as `_host_of` has it. Raises UserError."""
    bracketed = f"[{text}]" if text.count(":") > 1 and "[" not in text else text
    host = _host_of(bracketed)
    if not host or not re.fullmatch(rf"({_HOST})(:\d+)?", bracketed.lower(), re.ASCII):
        raise UserError(
            f"--allow-host {printable(text)}: a name is one host's, in a browser's letters, "
            "as photos.example or xn--bcher-kva.example"
        )
    return host


def _origin_in(text: str) -> str:
    """A value of --allow-origin as a browser sends it, without its scheme's own port. Raises UserError."""
    if text == "null":
        return text
    match = re.fullmatch(rf"([a-z][a-z\d+.-]*)://({_HOST})(?::(\d+))?", text.lower(), re.ASCII)
    if not match or not 0 < int(match[3] or 1) < 65536:
        raise UserError(
            f"--allow-origin {printable(text)}: an origin is scheme, host and maybe port, as https://photos.example"
        )
    scheme, host, port = match.groups()
    return f"{scheme}://{host}:{int(port)}" if port and int(port) != _PORTS.get(scheme) else f"{scheme}://{host}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}): give another --host or --port") from None


def _names(host: str, address: str, given: Sequence[str]) -> frozenset[str] | None:
    """The hosts that a request may name; None: any. A website can give a name of its own the address 127.0.0.1.

    address: what `host` stands for.
    """
    own = {"localhost", _plain(host)}
    if not _is_loopback(address):
        return frozenset({*given, *own, _plain(socket.gethostname()), "*addresses*"}) if given else None
    return frozenset({*given, *own})


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(text: str) -> str | None:
    """A Host header or a name without its port, in lower case; None where it is none."""
    try:
        parts = urlsplit(f"//{text}")
        return (parts.hostname or "").rstrip(".") or None
    except ValueError:
        return None


def _allow_files() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _address(host: str, port: int, prefix: str = "") -> str:
    if host in ("0.0.0.0", "::"):
        return f"http://{socket.gethostname()}:{port}{prefix}/ for everybody who reaches this machine"
    return f"http://[{host}]:{port}{prefix}/" if ":" in host else f"http://{host}:{port}{prefix}/"


def describe(run: Path) -> dict[str, Any]:
    """What `GET /model` tells of a run."""
    description = read_description(run, "run")
    scores: Mapping[str, Any] = description["scores"]
    correct, count = scores.get("correct", 0), scores.get("count", 0)
    return {
        "name": printable(run.resolve().name),
        "arch": description["arch"],
        "classes": [printable(name) for name in description["classes"]],
        "top1": correct / count if count else None,
        "interval": wilson_interval(correct, count) if count else None,
        "photos": count,
        "max_bytes": MAX_BYTES,
        "max_pixels": MAX_PIXELS,
    }


def make_server(
    classifier: Classifier,
    facts: Mapping[str, Any],
    folder: Path,
    *,
    names: frozenset[str] | None = frozenset({"localhost"}),
    proxied: Sequence[str] = (),
    origins: Sequence[str] = (),
    prefix: str = "",
) -> Any:
    """A uvicorn server with `decoders`, which its caller closes. folder: where an upload lies until it is answered.

    names: hosts that a request may name. proxied: those of them that a proxy's pages have, whatever host it names.
    origins: of websites that may ask. prefix: of all paths, "" or "/path".
    """
    from deploy.connections import Connection

    import uvicorn

    def finish(path: str, pixels: Any) -> Answer:
        return answer_of(classifier, path, pixels)

    explain: Explain | None = None
    with suppress(UserError):  # a network that shows nothing is served without it
        explain = explainer(classifier)

    class Server(uvicorn.Server):
        decoders = Decoders(classifier.preprocess, finish, whole=classifier.takes_whole, workers=cpu_cores() + 1)

        greeting = ""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.greeting:  # from here on a signal ends it in the regular way
                print(self.greeting, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.decoders.close()  # what waits is answered now
            await super().shutdown(sockets)

    app = _make_app(classifier, facts, folder, Server.decoders, explain, names, proxied, origins, prefix)
    settings: dict[str, Any] = {"log_level": "error", "access_log": False, "lifespan": "off", "ws": "none"}
    settings |= {"http": Connection, "timeout_keep_alive": 5, "timeout_graceful_shutdown": 1}
    settings["forwarded_allow_ips"] = os.environ.get("FORWARDED_ALLOW_IPS", _PROXIES)  # uvicorn's own variable
    return Server(uvicorn.Config(app, server_header=False, **settings))


def _make_app(
    classifier: Classifier,
    facts: Mapping[str, Any],
    folder: Path,
    decoders: Decoders,
    explain: Explain | None,
    names: frozenset[str] | None,
    proxied: Sequence[str],
    origins: Sequence[str],
    prefix: str,
) -> Any:
    """The ASGI application."""
    import anyio
    import anyio.to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
    from starlette.routing import Mount, Route

    page = _PAGE.read_text("utf-8")
    stored: Counter[str] = Counter()  # bytes, by address
    sizes: Counter[Path] = Counter()  # the same by upload

    def refusal(status: int, error: str, message: str) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse({"error": error, "message": message}, status, headers)

    def open_upload(path: Path) -> BufferedWriter:
        try:
            return open(path, "xb")
        except FileNotFoundError:  # what cleans the temporary folder has taken ours
            folder.mkdir(0o700)
            return open(path, "xb")

    async def store(request: Request, path: Path, address: str) -> int:
        """Writes the body's first MAX_BYTES and returns its whole length: a refusal is read once all is sent."""
        length, start, buffer = 0, anyio.current_time(), bytearray()
        with anyio.fail_after(min(_SECONDS, _GRACE)) as limit, open_upload(path) as file:
            room = min(_STORED, (shutil.disk_usage(folder).free + stored.total()) // 2)
            async for chunk in request.stream():
                length += len(chunk)
                limit.deadline = start + min(_SECONDS, _GRACE + length / _RATE)
                if length <= MAX_BYTES:
                    stored[address] += len(chunk)
                    sizes[path] += len(chunk)
                    is_little = stored[address] <= _LITTLE * room
                    if sizes[path] > _SHARE * room:  # no other upload's end would help
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    if stored[address] > _SHARE * room or (stored.total() > room and not is_little):
                        raise Busy
                    buffer += chunk
                    if len(buffer) >= _BUFFER:  # a busy disk lets its writers wait, which must not be everybody
                        await anyio.to_thread.run_sync(file.write, bytes(buffer))
                        buffer.clear()
                elif length > 16 * MAX_BYTES:
                    break
            file.write(buffer)
        return length

    def finish_explained(path: str, pixels: np.ndarray | str) -> tuple[Answer, str]:
        """The answer, and the square that it is of with a heat map, as an address that holds a JPEG."""
        found = answer_of(classifier, path, pixels)
        if explain is None or isinstance(pixels, str) or found.error:
            return found, ""
        picture = _jpeg(laid_over(pixels, explain(pixels, found)))
        return found, f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"

    async def classify(request: Request) -> JSONResponse:
        wanted = request.query_params.get("explain", "0")
        if wanted not in ("0", "1"):
            return refusal(400, "no such value", "explain is 0 or 1.")
        is_explained = wanted == "1"
        if is_explained and explain is None:
            return refusal(400, "no explanation", "What is served here cannot show where it finds a class.")
        if request.headers.get("content-type", "").startswith("multipart/"):
            return refusal(415, "a form", "Send the photo's bytes as they are: curl --data-binary @photo.jpg URL")
        path, address = folder / secrets.token_hex(16), _client(request)
        try:
            if decoders.is_full(address):
                raise Busy
            length = await store(request, path, address)
            if length > MAX_BYTES:
                return refusal(413, "too large", f"{MAX_BYTES >> 20} MB is the most.")
            finish = finish_explained if is_explained else None
            result = await asyncio.wrap_future(decoders.submit(str(path), address, finish))
            found, picture = result if is_explained else (result, "")
        except Busy:
            return refusal(503, "busy", "The server has much to do. Try again in a moment.")
        except TimeoutError:
            return refusal(408, "too slow", f"The upload took more than {_SECONDS} seconds, or hardly went on.")
        except OSError as error:
            return refusal(507, "no room", f"The server cannot store the upload ({error.strerror}).")
        except ClientDisconnect:
            return refusal(400, "broken off", "The upload was broken off.")
        finally:
            with suppress(OSError):
                path.unlink()
            stored[address] -= sizes.pop(path, 0)
            if not stored[address]:
                del stored[address]
        if found.error:
            fault = found.error.partition(" (")[0]
            return refusal(400, fault, _MESSAGES.get(fault, f"The photo {found.error}."))
        shares = found.ranking(classifier.classes)
        ranking = [{"class": name, "confidence": round(share, 6)} for name, share in shares]
        told: dict[str, Any] = {**ranking[0], "runner_up": ranking[1]["class"], "classes": ranking[:_SHOWN]}
        told |= {"unsure": shares[0][1] < facts["unsure"]["below"]} if "unsure" in facts else {}
        return JSONResponse(told | ({"explanation": picture} if picture else {}))

    async def show_page(_: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    async def show_model(_: Request) -> JSONResponse:
        return JSONResponse({**facts, "test_flips": classifier.test_flips, "explain": explain is not None})

    async def show_health(_: Request) -> JSONResponse:
        return JSONResponse({"state": "busy"}, 503) if decoders.is_full() else JSONResponse({"state": "ok"})

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            known = "There is GET /, GET /model, GET /health and POST /classify."
            return refusal(error.status_code, error.detail.lower(), known)
        return refusal(500, "failed", "The server failed; its terminal says why.")

    async def to_folder(_: Request) -> RedirectResponse:
        return RedirectResponse(f"{prefix}/")

    class Guard:
        """Refuses what a browser sends for a website that is not the server's own, or under a name that is not."""

        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            request, app = Request(scope), self._app
            path = scope["path"].removeprefix(prefix)
            host = request.headers.get("host", "")
            if path != "/health" and not _is_named(host, names):
                told = "The server does not know itself by this name: start it with --allow-host NAME."
                app = refusal(421, "unknown host", told)
            elif path not in ("", "/", "/health") and not _is_own(request.headers, origins, proxied):
                told = "Another website asks: start the server with --allow-origin ORIGIN where that is meant."
                app = refusal(403, "another website", told)
            await app(scope, receive, send)

    routes: list[Any] = [
        Route("/", show_page),
        Route("/model", show_model),
        Route("/health", show_health),
        Route("/classify", classify, methods=["POST"]),
    ]
    if prefix:  # some proxies take it off, some do not
        routes = [Route(prefix, to_folder), Mount(prefix, routes=list(routes)), *routes]
    middleware = [Middleware(Guard)]
    if origins:
        allowed: Any = {"allow_methods": ["GET", "POST"], "allow_headers": ["content-type"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(origins), **allowed))
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: refuse, Exception: refuse}
    )


def _jpeg(pixels: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG", quality=85)
    return written.getvalue()


def _client(request: Any) -> str:
    """The address that a share is counted for: of IPv6 a household's network."""
    host = request.client.host if request.client else ""
    if ":" not in host:
        return host
    with suppress(ValueError):
        address = ipaddress.IPv6Address(host.partition("%")[0])
        if address.ipv4_mapped:  # of a server that listens by both
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


def _is_named(header: str, names: frozenset[str] | None) -> bool:
    """Whether a Host header is one of the server's names. An address is one; no website can make another's its own."""
    host = _host_of(header)
    if names is None or not header or host in names:
        return True
    if "*addresses*" in names:
        with suppress(ValueError):
            return bool(ipaddress.ip_address(host or ""))
    return _is_loopback(host or "")


def _is_own(headers: Mapping[str, str], origins: Collection[str], proxied: Collection[str]) -> bool:
    """Whether no browser says that another website asks (Fetch Metadata; the Fetch standard's Origin header)."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin in origins or site == "same-origin":
        return True
    if site in ("cross-site", "same-site"):
        return False
    if origin is None:
        return True
    try:
        asked = urlsplit(origin)
    except ValueError:  # as `http://[`
        return False
    # Behind a proxy Host may be another; but each port of this machine is a website of its own.
    is_a_name = asked.hostname in proxied and asked.hostname != "localhost" and not _is_loopback(asked.hostname or "")
    return asked.netloc.lower() == headers.get("host", "").lower() or is_a_name


if __name__ == "__main__":
    code = run_script(main, sys.argv[1:])
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # all is put away, and taking PyTorch down takes a second and more

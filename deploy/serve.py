"""A web page for a trained run, and an endpoint for programs.

    python deploy/serve.py runs/NAME                  # http://127.0.0.1:8000, for this machine alone
    python deploy/serve.py runs/NAME --weights onnx   # the graph of deploy/export.py, without PyTorch's network
    python deploy/serve.py runs/NAME --host 0.0.0.0   # for the network too, a phone say; there is no password

    curl --data-binary @photo.jpg http://127.0.0.1:8000/classify
    {"class": "bees", "confidence": 0.98, "runner_up": "ants", "classes": [{"class": "bees", "confidence": 0.98}, ...]}

A body is one photo's bytes. What is no photo is answered by `error`, one or two words, and `message`, a sentence, with
a status of 400 or above. `GET /model` tells classes, scores and limits. The page loads nothing from elsewhere and the
server asks nobody; a photo lies in a temporary folder until it is answered, under a name of the server's own.
"""

import argparse
import asyncio
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded, which takes seconds; later `run_script` answers it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from pipelines.config import ScriptParser
from pipelines.errors import UserError
from pipelines.evaluation import wilson_interval
from pipelines.headers import judge
from pipelines.inference import Answer, Classifier, import_extra, open_onnx, open_run
from pipelines.processes import Terminated, cpu_cores, run_script
from pipelines.run_files import read_description
from pipelines.text import printable

import torch

MAX_BYTES = 32 * 2**20  # of a photo
MAX_PIXELS = 64_000_000  # an opened photo takes 3 to 12 bytes a pixel
_LARGE = 16_000_000  # pixels; of larger photos one is opened at a time
_UPLOADS = 32  # at a time; the others wait before anything of them is stored
_CONNECTIONS = 512
_SECONDS = 120  # for one upload
_SHOWN = 5  # classes of an answer
_PAGE = Path(__file__).resolve().with_name("page.html")
_POLICY = "default-src 'self' 'unsafe-inline'; img-src blob: data:; base-uri 'none'; form-action 'none'"
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
    uvicorn = import_extra("uvicorn")
    import_extra("starlette")
    facts = describe(options.run)
    # One thread for each photo, and several photos at a time: the cores are not shared out twice.
    torch.set_num_threads(1)
    if options.weights == "onnx":
        classifier: Classifier = open_onnx(options.run / "export" / "model.onnx")
    else:
        classifier = open_run(options.run, torch.device("cpu"))
    listener = _listen(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="dalitune-") as folder:
        app = make_app(classifier, facts, Path(folder))
        settings = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
        limits = {"limit_concurrency": _CONNECTIONS, "timeout_graceful_shutdown": 5}
        server = uvicorn.Server(uvicorn.Config(app, server_header=False, **settings, **limits))
        host, port = listener.getsockname()[:2]
        print(f"{facts['name']} ({options.weights}): {_address(host, port)}   Ctrl-C ends it", flush=True)
        try:
            server.run(sockets=[listener])
        except (KeyboardInterrupt, Terminated):
            print("stopped", flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("serve.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with best.pt and model.json")
    parser.add_argument("--weights", choices=("pytorch", "onnx"), default="pytorch", help="(default: pytorch)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    return parser.parse_args(arguments)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}): give another --host or --port") from None


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        return f"http://{socket.gethostname()}:{port}/ for everybody who reaches this machine"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


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


def make_app(classifier: Classifier, facts: Mapping[str, Any], folder: Path) -> Any:
    """The ASGI application. folder: where an upload lies until it is answered."""
    import anyio
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    page = _PAGE.read_text("utf-8")
    uploads = anyio.Semaphore(_UPLOADS)
    small = ThreadPoolExecutor(min(cpu_cores(), 8), thread_name_prefix="small")
    large = ThreadPoolExecutor(1, thread_name_prefix="large")  # a thread of its own, as malloc keeps memory by thread

    def refusal(status: int, error: str, message: str) -> JSONResponse:
        return JSONResponse({"error": error, "message": message}, status)

    async def store(request: Request, path: Path) -> int:
        """Writes the body's first MAX_BYTES and returns its whole length: a refusal is read once all is sent."""
        length = 0
        with open(path, "xb") as file:
            async for chunk in request.stream():
                length += len(chunk)
                if length <= MAX_BYTES:
                    file.write(chunk)
                elif length > 16 * MAX_BYTES:
                    break
        return length

    async def answer(path: str) -> Answer:
        run = asyncio.get_running_loop().run_in_executor
        height, width = (await run(small, judge, os.fsencode(path))).size
        if height * width > MAX_PIXELS:
            return Answer(path, None, "too many pixels")
        return await run(small if height * width <= _LARGE else large, lambda: next(iter(classifier.classify([path]))))

    async def classify(request: Request) -> JSONResponse:
        if request.headers.get("content-type", "").startswith("multipart/"):
            return refusal(415, "a form", "Send the photo's bytes as they are: curl --data-binary @photo.jpg URL")
        async with uploads:
            path = folder / secrets.token_hex(16)
            try:
                with anyio.fail_after(_SECONDS):
                    length = await store(request, path)
                if length > MAX_BYTES:
                    return refusal(413, "too large", f"{MAX_BYTES >> 20} MB is the most.")
                found = await answer(str(path))
            except TimeoutError:
                return refusal(408, "too slow", f"The upload took more than {_SECONDS} seconds.")
            except OSError as error:
                return refusal(507, "no room", f"The server cannot store the upload ({error.strerror}).")
            except ClientDisconnect:
                return refusal(400, "broken off", "The upload was broken off.")
            finally:
                path.unlink(missing_ok=True)
        if found.error:
            fault = found.error.partition(" (")[0]
            return refusal(400, fault, _MESSAGES.get(fault, f"The photo {found.error}."))
        ranking = [{"class": name, "confidence": round(share, 6)} for name, share in found.ranking(classifier.classes)]
        return JSONResponse({**ranking[0], "runner_up": ranking[1]["class"], "classes": ranking[:_SHOWN]})

    async def show_page(_: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    async def show_model(_: Request) -> JSONResponse:
        return JSONResponse(dict(facts))

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            return refusal(error.status_code, error.detail.lower(), "There is GET /, GET /model and POST /classify.")
        return refusal(500, "failed", "The server failed; its terminal says why.")

    routes = [
        Route("/", show_page),
        Route("/model", show_model),
        Route("/classify", classify, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: refuse})


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))

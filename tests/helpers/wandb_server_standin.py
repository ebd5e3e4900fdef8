"""A stand-in for a W&B server: what the client needs to create, stream, resume and sync a run. It is not the real one.

What it cannot show: the real server's rate limits, its rules for rows of equal `_step`, and its pages.
"""

import gzip
import json
import re
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4  # any key of 40 characters will do


class StandInServer:
    """Keeps what was sent: per run id `history` (rows), `summary`, `config`, `exit_code`, `preempting`; `artifacts`
    and `alerts`.

    `stop` refuses connections, as a server that is down does; `start` listens on the same port with the same content.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.upload_seconds = 0.0
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"kept": self})
        self._http = _QuietServer(("127.0.0.1", self.port), handler)
        self.port = self._http.server_port
        self._open: set[Any] = set()
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):  # a client keeps its connection, and would be answered still
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL reply; None for what is not known here, which the client takes for an older server."""
        entity = values.get("entity") or values.get("entityName") or "me"
        project = values.get("project") or values.get("model") or values.get("projectName") or "project"
        name = values.get("name") or values.get("id")
        known = {"id": "UHJvajox", "name": project, "entity": {"id": "RW50OjE=", "name": entity}}
        viewer = {"id": "VXNlcjox", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": viewer}
        if operation == "UpsertBucket":
            inserted = name not in self.runs
            run = self.run(name)
            run["config"] |= json.loads(values.get("config") or "{}")
            for key in ("displayName", "groupName", "tags", "commit"):
                run[key] = values.get(key) or run.get(key)
            return {"upsertBucket": {"bucket": self._bucket(name, known), "inserted": inserted}}
        if operation == "RunResumeStatus":
            return {"model": {**known, "bucket": self._bucket(name, known) if name in self.runs else None}}
        if operation in ("Run", "RunHistoryKeys"):  # what wandb.Api asks
            return {"project": {"run": self._public_run(name) if name in self.runs else None}}
        if operation == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{values['run']}/{file}"} for file in values["files"]
            ]
            return {"createRunFiles": {"runID": "UnVuOjE=", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(values)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        given = values.get("input", values)
        if operation == "CreateArtifact":
            self.artifacts.append(given)
            sequence = {"id": "U2VxOjE=", "latestArtifact": None}
            return {
                "createArtifact": {"artifact": {"id": "QXJ0OjE=", "state": "PENDING", "artifactSequence": sequence}}
            }
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            file = {"id": "RmlsOjE=", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json"}
            file |= {"uploadUrl": f"{self.url}/upload/artifact/wandb_manifest.json", "uploadHeaders": []}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": {"id": "TWFuOjE=", "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {"id": "RmlsOjE=", "name": file["name"], "displayName": file["name"], "uploadHeaders": []}
                | {"uploadUrl": f"{self.url}/upload/artifact/{file['name']}", "uploadMultipartUrls": None}
                | {"storagePath": file["name"], "artifact": {"id": "QXJ0OjE="}}
                for file in given["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "QXJ0OjE=", "state": "COMMITTED", "digest": "x"}}}
        return None

    def stream(self, name: str, chunk: dict[str, Any]) -> None:
        """One request of a run's file stream: rows at their offset, and the newest summary."""
        run, files = self.run(name), chunk.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            at = rows["offset"]
            run["history"][at : at + len(rows["content"])] = [json.loads(row) for row in rows["content"]]
        if summary := files.get("wandb-summary.json"):
            run["summary"] = json.loads(summary["content"][-1])
        run["preempting"] = run["preempting"] or bool(chunk.get("preempting"))
        if chunk.get("complete"):
            run["exit_code"] = chunk.get("exitcode")

    def run(self, name: str) -> dict[str, Any]:
        new = {"history": [], "summary": {}, "config": {}, "exit_code": None, "preempting": False}
        return self.runs.setdefault(name, new)

    def _public_run(self, name: str) -> dict[str, Any]:
        run = self.run(name)
        keys = {"lastStep": run["history"][-1]["_step"] if run["history"] else -1, "keys": {}, "sets": []}
        texts = {key: json.dumps(run[key]) for key in ("config", "summary")}
        return {
            "id": "UnVuOjE=",
            "projectId": "1",
            "name": name,
            "displayName": name,
            "state": "finished",
            "tags": [],
            "config": texts["config"],
            "summaryMetrics": texts["summary"],
            "systemMetrics": "{}",
            "historyLineCount": len(run["history"]),
            "historyKeys": keys,
            "user": {"name": "me", "username": "me"},
        }

    def _bucket(self, name: str, project: dict[str, Any]) -> dict[str, Any]:
        run = self.run(name)
        tail = [json.dumps(run["history"][-1])] if run["history"] else []
        return {
            "id": "UnVuOjE=",
            "name": name,
            "displayName": run.get("displayName") or name,
            "description": "",
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "project": project,
            "tags": run.get("tags") or [],
            "summaryMetrics": json.dumps(run["summary"]),
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "wandbConfig": '{"t": 1}',
        }


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed leaves its connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kept: StandInServer

    def setup(self) -> None:
        super().setup()
        self.kept._open.add(self.connection)

    def finish(self) -> None:
        self.kept._open.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _handle(self) -> None:
        body, reply = self._body(), dict[str, Any]()
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
            data = self.kept.answer(operation[1] if operation else "", request.get("variables") or {})
            reply = {"data": data} if data is not None else {"data": None, "errors": [{"message": "not known here"}]}
        elif self.path.endswith("/file_stream"):
            self.kept.stream(self.path.split("/")[-2], json.loads(body or b"{}"))
            reply = {"exitcode": None, "limits": {}}
        elif self.path.startswith("/upload/"):
            time.sleep(self.kept.upload_seconds)
            self.kept.uploads[self.path.removeprefix("/upload/")] = body
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _handle

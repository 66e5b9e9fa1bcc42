"""A server of files on this machine that can misbehave in the ways of real ones."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


@dataclass
class Server:
    """What is served, and how.

    Attributes:
        url: Address without a slash at its end.
        files: Content by path without its first slash.
        drops: After how many bytes each of the next answers with content breaks off.
        statuses: Codes with which the next requests are refused.
        ranges: Whether parts are sent.
        encoding: Content-Encoding that is claimed.
        changes: Content of each file after the next request for it.
        kind: Content-Type.
        lie: Bytes added to the length that is announced.
        most: Bytes that a part has at most, as a proxy may send it.
        asked: (method, path, Range) of each request.
        folder: Where files are that `files` does not have; answers have a mark that tells whether a file has changed.
        marks: Whether they have it.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    encoding: str = ""
    changes: dict[str, bytes] = field(default_factory=dict)
    kind: str = "application/octet-stream"
    lie: int = 0
    most: int = 1 << 40
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    folder: Path | None = None
    marks: bool = True

    def content(self, name: str) -> bytes | None:
        if self.folder is not None and (self.folder / name).is_file():
            return (self.folder / name).read_bytes()
        return self.files.get(name)

    def ranges_asked(self) -> list[str]:
        return [part for method, _, part in self.asked if method == "GET"]


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


@contextmanager
def serving(folder: Path | None = None) -> Iterator[Server]:
    """A server that runs for as long as the context."""
    served = Server(folder=folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.lstrip("/")
            wanted = self.headers.get("Range", "")
            served.asked.append((self.command, path, wanted))
            self.close_connection = True
            name = path.partition("?")[0]
            content = served.content(name)
            if content is None or (body and served.statuses):
                return self.send_error(404 if content is None else served.statuses.pop(0))
            served.files |= {name: served.changes.pop(name)} if name in served.changes else {}
            start = 0
            if wanted and served.ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start = int(first)
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206)
                end = min(len(content), start + served.most, int(last) + 1 if last else len(content))
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
                content = content[:end]
            else:
                self.send_response(200)
            if served.folder is not None:
                self.send_header("Accept-Ranges", "bytes" if served.ranges else "none")
                if served.marks:
                    self.send_header("ETag", str((served.folder / name).stat().st_mtime_ns))
            self.send_header("Content-Type", served.kind)
            self.send_header("Content-Length", str(len(content) - start + served.lie))
            if served.encoding:
                self.send_header("Content-Encoding", served.encoding)
            self.end_headers()
            if body:
                end = start + served.drops.pop(0) if served.drops else len(content)
                self.wfile.write(content[start:end])
            return None

        def log_message(self, *words: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}"
    Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield served
    finally:
        http.shutdown()
        http.server_close()

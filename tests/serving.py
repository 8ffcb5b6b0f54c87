"""A running `python -m trainer.serve`, and what its clients send."""

import http.client
import io
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT, arguments
from PIL import Image

PREDICT = "/v1/models/digitfleet:predict"
BLANK = np.zeros((28, 28, 1)).tolist()


class Server:
    """A running `python -m trainer.serve`; ready when it is made."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.stderr = folder / f"stderr-{uuid.uuid4().hex}"
        command = [sys.executable, "-m", "trainer.serve", *arguments({"port": 0, **options})]
        with open(self.stderr, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        self.line = self.process.stdout.readline()
        found = re.fullmatch(r"trainer\.serve: \S+ on http://(\S+):(\d+)/\n", self.line)
        assert found, self.line + self.stderr.read_text()
        self.host, self.port = found[1], int(found[2])

    def ask(self, path: str, body: Any = None, *, method: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; `body` is bytes, or becomes JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, content, named)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        status, _, content = self.ask(path, body, **headers)
        assert status == 200, content
        return json.loads(content)

    def error(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and message of a refused request."""
        status, found, content = self.ask(path, body, **headers)
        assert found["Content-Type"] == "application/json"
        assert json.loads(content).keys() == {"error"}
        return status, json.loads(content)["error"]

    def end(self, number: int) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def form(files: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--limit--\r\n", "multipart/form-data; boundary=limit"

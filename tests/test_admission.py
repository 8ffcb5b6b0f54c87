"""Which requests `trainer.serve` takes: of bounded sizes and rates, from this origin."""

import base64
import io
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import BLANK, PREDICT, Server, png


@pytest.mark.parametrize("side", [5_000, 10_000, 20_000])
@pytest.mark.parametrize("path", ["/api/predict", PREDICT])
def test_small_file_of_many_pixels_is_refused_before_it_is_unpacked(path: str, side: int, server: Server) -> None:
    content = io.BytesIO()
    Image.new("1", (side, side)).save(content, "PNG")
    body: Any = content.getvalue()
    assert len(body) < 100_000
    if path == PREDICT:
        body = {"signature_name": "image_bytes", "instances": [{"b64": base64.b64encode(body).decode()}]}
    status, message = server.error(path, body)
    assert status == 400
    assert "too large" in message


def test_large_body_is_refused(server: Server) -> None:
    assert server.ask("/api/predict", bytes(2 * 2**20))[0] == 400, "of the largest size, it is read"
    assert server.error("/api/predict", bytes(2 * 2**20 + 1)) == (413, "the request is larger than 2 MiB (--max_body_mb)")
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
        assert b" 413 " in connection.recv(1000), "before any of it has come"


def test_pages_of_other_origins_are_refused(server: Server) -> None:
    body = {"instances": [BLANK]}
    own = f"127.0.0.1:{server.port}"
    server.json(PREDICT, body, Origin=f"http://{own}")
    for origin in ("http://example.org", "null", f"http://localhost:{server.port}", "http://127.0.0.1"):
        assert server.error(PREDICT, body, Origin=origin)[0] == 403, origin
        assert server.error("/api/predict", png(np.eye(28) > 0), Origin=origin)[0] == 403, origin


def test_name_that_leads_here_all_the_same_is_refused(server: Server) -> None:
    for host in ("example.org", f"example.org:{server.port}", "127.0.0.1.example.org", "[", ""):
        assert server.error("/api/model", Host=host)[0] == 403, host
    for host in ("localhost:9000", "127.0.0.1", "[::1]:8501"):
        assert server.json("/api/model", Host=host)


def test_clients_rate_is_limited_and_everybody_is_warned(finished: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, model_dir=finished, host="0.0.0.0", max_requests_per_second=1, model_name="digits.v2")
    try:
        assert "no authentication" in server.stderr.read_text()
        assert len(server.stderr.read_text().splitlines()) == 1
        # Any second with two requests has one too many.
        answers = (server.ask("/v1/models/digits.v2", Host="model.example.org") for _ in range(1000))
        status, headers, content = next(answer for answer in answers if answer[0] != 200)
        assert status == 429
        assert int(headers["Retry-After"]) >= 1
        assert "--max_requests_per_second" in json.loads(content)["error"]
        assert {server.ask("/healthz")[0] for _ in range(20)} == {200}, "probes are not counted"
        time.sleep(int(headers["Retry-After"]))
        assert server.ask("/v1/models/digits.v2")[0] == 200
        assert server.end(signal.SIGINT) == 0
        assert len(server.stderr.read_text().splitlines()) == 1
    finally:
        server.close()

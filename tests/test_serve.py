"""The command that serves the exported model: a real process, real HTTP, real signals."""

import base64
import concurrent.futures
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from PIL import Image
from serving import BLANK, PREDICT, Server, form, png

from trainer import exported, predict
from trainer.classifier import Classifier
from trainer.errors import RequestError
from trainer.ports import free_ports


@pytest.fixture(scope="module")
def model(finished: Path) -> exported.Model:
    return exported.load(str(finished))


def test_page_and_its_files_come_with_strict_headers(server: Server) -> None:
    status, headers, content = server.ask("/")
    assert status == 200
    page = content.decode()
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    modules = [f"page/{path.name}" for path in (ROOT / "trainer" / "page").glob("*.js")]
    assert "page/page.js" in used
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|https?://", page), "the policy forbids what is inline"
    kinds = {"js": "javascript", "css": "text/css", "svg": "image/svg"}
    for path in {*used, *modules}:
        status, headers_of_file, content = server.ask(f"/{path}")
        assert status == 200, path
        assert content
        assert kinds[path.rpartition(".")[2]] in headers_of_file["Content-Type"]
        assert headers_of_file["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert not any(name.startswith("Access-Control") for name in headers)


def test_every_element_that_the_scripts_ask_for_is_on_the_page() -> None:
    folder = ROOT / "trainer" / "page"
    ids = set(re.findall(r'\bid="([^"]+)"', (folder / "index.html").read_text()))
    for path in folder.glob("*.js"):
        asked = set(re.findall(r'byId\("([^"]+)"\)', path.read_text()))
        assert asked <= ids, path


def test_export_that_is_cut_short_is_told(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "export", tmp_path / "export")
    os.truncate(tmp_path / "export" / "variables" / "variables.data-00000-of-00001", 1000)
    with pytest.raises(RequestError, match=r"export is damaged \(.*\): remove .*result.json and run the job's command again"):
        exported.load(str(tmp_path))


def test_probe_and_description(server: Server) -> None:
    assert server.json("/healthz") == {"status": "ok"}
    described = server.json("/api/model")
    assert described["class_names"] == list("0123456789")
    assert described["input_shape"] == [28, 28, 1]
    assert described["pictures"] == "digits"
    assert described["limits"]["body_bytes"] == 2 * 2**20


def test_files_are_classified_as_predict_does(server: Server, finished: Path, mnist, tmp_path: Path) -> None:
    files = []
    for number in range(4):
        large = Image.fromarray(mnist.test.images[number, ..., 0]).resize((90, 120))
        files.append((f"{number}.png", png(255 - np.asarray(large))))
        (tmp_path / files[-1][0]).write_bytes(files[-1][1])
    body, kind = form(files)
    found = server.json("/api/predict", body, Content_Type=kind)["predictions"]
    expected = list(predict.predict(str(finished), [tmp_path / name for name, _ in files]))
    assert [one["file"] for one in found] == [name for name, _ in files]
    for one, wanted in zip(found, expected, strict=True):
        assert one["class_name"] == wanted["class_name"]
        assert one["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    (alone,) = server.json("/api/predict", files[2][1], Content_Type="image/png")["predictions"]
    assert alone["probabilities"] == pytest.approx(expected[2]["probabilities"], abs=1e-5)


def test_many_clients_at_once_get_their_own_answers(server: Server, mnist) -> None:
    contents = [png(mnist.test.images[number % 8, ..., 0]) for number in range(64)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = [answer["predictions"][0] for answer in pool.map(lambda content: server.json("/api/predict", content), contents)]
    assert len({json.dumps(one["probabilities"]) for one in found[:8]}) == 8
    for number, one in enumerate(found):
        assert one["probabilities"] == pytest.approx(found[number % 8]["probabilities"], abs=1e-5)
        assert one["input"] == found[number % 8]["input"]


def test_answer_shows_what_the_network_sees(server: Server, mnist) -> None:
    pixels = mnist.test.images[0, ..., 0]
    (found,) = server.json("/api/predict", png(255 - pixels))["predictions"]
    kind, _, content = found["input"].partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), pixels)


def test_status_and_metadata_are_those_of_tensorflow_serving(server: Server) -> None:
    (status,) = server.json("/v1/models/digitfleet")["model_version_status"]
    assert status == {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert server.json("/v1/models/digitfleet/versions/1")["model_version_status"] == [status]
    metadata = server.json("/v1/models/digitfleet/metadata")
    assert metadata["model_spec"] == {"name": "digitfleet", "signature_name": "", "version": "1"}
    signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["images"]["dtype"] == "DT_FLOAT"
    sizes = [part["size"] for part in signature["inputs"]["images"]["tensor_shape"]["dim"]]
    assert sizes == ["-1", "28", "28", "1"]


@pytest.mark.parametrize("layout", ["rows", "named rows", "columns", "named columns"])
@pytest.mark.parametrize("signature", ["serving_default", "serving_uint8", "image_bytes"])
def test_requests_by_the_rules_of_tensorflow_serving(
    signature: str, layout: str, server: Server, model: exported.Model, mnist
) -> None:
    """Rules: a lone input needs no name; rows give a list of objects, columns one object; bytes are {"b64": ...}."""
    described = server.json("/v1/models/digitfleet/metadata")["metadata"]["signature_def"]["signature_def"][signature]
    ((name, spec),) = described["inputs"].items()
    images = mnist.test.images[:3]
    if spec["dtype"] == "DT_STRING":
        contents = [png(image[..., 0]) for image in images]
        values = [{"b64": base64.b64encode(content).decode()} for content in contents]
        given = tf.constant(contents)
    else:
        values = images.tolist()
        given = tf.constant(images, {"DT_FLOAT": tf.float32, "DT_UINT8": tf.uint8}[spec["dtype"]])
    request = {
        "rows": {"instances": values},
        "named rows": {"instances": [{name: value} for value in values]},
        "columns": {"inputs": values},
        "named columns": {"inputs": {name: values}},
    }[layout]
    if signature != "serving_default":
        request["signature_name"] = signature
    answer = server.json(PREDICT, request, Content_Type="application/x-www-form-urlencoded")  # As `curl -d` says.
    expected = {key: value.numpy() for key, value in model.signatures[signature](**{name: given}).items()}
    if "rows" in layout:
        assert answer.keys() == {"predictions"}
        outputs = {key: [row[key] for row in answer["predictions"]] for key in answer["predictions"][0]}
    else:
        assert answer.keys() == {"outputs"}
        outputs = answer["outputs"]
    assert outputs.keys() == described["outputs"].keys()
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-5)
    assert outputs["classes"] == expected["classes"].tolist()
    assert outputs["class_names"] == [text.decode() for text in expected["class_names"]]


WRONG = {
    "no JSON": (b"{", "no JSON"),
    "not UTF-8": (b"\xff\xfe\xfd", "no JSON"),
    "nested without end": (b"[" * 100_000, "no JSON"),
    "no object": ([1], "must be a JSON object, this is a list"),
    "nothing to classify": ({}, 'either "instances"'),
    "both forms": ({"instances": [BLANK], "inputs": [BLANK]}, 'either "instances"'),
    "rows that are no list": ({"instances": 3}, "must be a list, this is a number"),
    "no rows": ({"instances": []}, "shape [N, 28, 28, 1], this has [0]"),
    "one picture too deep": ({"instances": [[BLANK]]}, "must have the shape [N, 28, 28, 1], this has [1, 1, 28, 28, 1]"),
    "another size": ({"inputs": np.zeros((2, 28, 27, 1)).tolist()}, "this has [2, 28, 27, 1]"),
    "rows of two sizes": ({"instances": [BLANK, BLANK[:27]]}, "must be of one length"),
    "NaN": ({"instances": np.full((1, 28, 28, 1), np.nan).tolist()}, "NaN and infinite"),
    "negative pixels": ({"instances": np.full((1, 28, 28, 1), -255.0).tolist()}, "these go from -255 to -255"),
    "pixels from -1 to 1": ({"instances": (2 * np.eye(28)[None, ..., None] - 1).tolist()}, "these go from -1 to 1"),
    "all -1": ({"instances": [np.zeros((28, 28, 1)).tolist(), np.full((28, 28, 1), -1).tolist()]}, "these go from -1 to 0"),
    "no pixels": ({"instances": np.full((1, 28, 28, 1), 1e15).tolist()}, "expected pixels from 0 to 255, or from 0 to 1"),
    "too large for float32": ({"instances": np.full((1, 28, 28, 1), 1e39).tolist()}, "NaN and infinite"),
    "text": ({"instances": [[[["a"]] * 28] * 28]}, "expected numbers alone"),
    "null": ({"instances": [[[[None]] * 28] * 28]}, "expected numbers alone"),
    "another input": ({"instances": [{"pixels": BLANK}]}, "the input 'images' alone, this has 'pixels'"),
    "no such signature": ({"signature_name": "nn", "instances": [BLANK]}, "no signature 'nn': there are image_bytes"),
    "a signature without input": ({"signature_name": "__saved_model_init_op", "instances": [BLANK]}, "no signature"),
    "a number for a name": ({"signature_name": 3, "instances": [BLANK]}, "must be a string"),
    "uint8 of 256": ({"signature_name": "serving_uint8", "instances": [[[[256]] * 28] * 28]}, "from 0 to 255"),
    "uint8 of a half": ({"signature_name": "serving_uint8", "instances": [[[[0.5]] * 28] * 28]}, "whole numbers"),
    "no base64": ({"signature_name": "image_bytes", "instances": [{"b64": "?"}]}, "no base64"),
    "no bytes": ({"signature_name": "image_bytes", "instances": [3]}, "expected a string or"),
    "no picture": ({"signature_name": "image_bytes", "instances": [{"b64": "AAAA"}]}, "picture 0: no image"),
    "half a picture": (
        {"signature_name": "image_bytes", "instances": [{"b64": base64.b64encode(png(np.eye(99) > 0)[:90]).decode()}]},
        "image_bytes: Invalid PNG data",
    ),
    "too many": ({"instances": np.zeros((257, 28, 28, 1), int).tolist()}, "257 pictures given: a request takes 1 to 256"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_request_is_told_in_one_line(kind: str, server: Server) -> None:
    body, words = WRONG[kind]
    status, message = server.error(PREDICT, body)
    assert status == 400
    assert words in message
    assert "\n" not in message
    assert "Traceback" not in server.stderr.read_text()


def test_a_network_that_overflows_is_told(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(str(finished))
    monkeypatch.setattr(classifier, "_run", lambda *_: {"probabilities": np.full((1, 10), np.nan, np.float32)})
    with pytest.raises(RequestError, match="no finite numbers"):
        classifier.run("serving_default", np.full((1, 28, 28, 1), 255, np.float32))


def test_wrong_files_are_told_by_name(server: Server) -> None:
    assert server.error("/api/predict", b"no picture") == (400, "the picture: no image: expected PNG, JPEG, GIF, WebP or BMP")
    body, kind = form([("a.png", png(np.eye(28) > 0)), ("b.png", b"no picture")])
    assert server.error("/api/predict", body, Content_Type=kind) == (400, "b.png: no image: expected PNG, JPEG, GIF, WebP or BMP")
    body, kind = form([])
    assert server.error("/api/predict", body, Content_Type=kind) == (400, "0 pictures given: a request takes 1 to 256")
    body, kind = form([("a.png", b"")] * 257)
    assert server.error("/api/predict", body, Content_Type=kind)[1].startswith("257 pictures given")


def test_unknown_addresses_and_methods_are_json_errors(server: Server) -> None:
    body = {"instances": [BLANK]}
    assert server.error("/v1/models/other:predict", body) == (404, "no model 'other' here: this one is 'digitfleet'")
    assert server.error("/v1/models/other")[0] == 404
    assert server.error("/v1/models/digitfleet/versions/2:predict", body)[0] == 404
    assert server.error("/v1/models/digitfleet:classify", body)[0] == 400
    assert server.error("/page/../web.py")[0] == 404
    assert server.error("/page/%2e%2e/web.py")[0] == 404
    status, headers, _ = server.ask("/api/predict")
    assert status == 405
    assert "POST" in headers["Allow"]


def test_sigterm_ends_it_while_a_client_stays_connected(finished: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, model_dir=finished)
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
            assert server.json("/healthz")
            assert server.end(signal.SIGTERM) == 0
        assert server.stderr.read_text() == ""
    finally:
        server.close()


def test_sigterm_during_the_start_ends_it(finished: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trainer.serve", f"--model_dir={finished}", f"--port={port}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model_dir must be given"),
        (["--model_dir=/nowhere", "extra"], "unexpected argument 'extra'"),
        (["--model_dir=/nowhere", "--port=0"], "no finished job there"),
        (["--model_dir=/nowhere", "--port=65536"], "--port"),
        (["--model_dir=/nowhere", "--port={taken}"], "Address already in use): choose another"),
        (["--model_dir=/nowhere", "--port=0", "--host=no.such.host.invalid"], "--host=no.such.host.invalid"),
        (["--model_dir=/nowhere", "--model_name=a/b"], "--model_name=a/b"),
        (["--model_dir=/nowhere", "--max_body_mb=0"], "--max_body_mb"),
        (["--model_dir=/nowhere", "--max_requests_per_second=-1"], "--max_requests_per_second"),
    ],
)
def test_wrong_start_is_one_line_and_exit_code_2(argv: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [argument.format(taken=taken.getsockname()[1]) for argument in argv]
        command = [sys.executable, "-m", "trainer.serve", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line

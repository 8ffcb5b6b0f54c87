"""The web application of `serve`: the page, its API, and TensorFlow Serving's REST API."""

import base64
import dataclasses
from typing import Any

import flask
import numpy as np
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from PIL import Image
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, RequestEntityTooLarge, TooManyRequests

from trainer import admission, pictures, rest
from trainer.classifier import Classifier
from trainer.errors import RequestError

# TensorFlow Serving takes it from the name of the folder; here there is one model, and it stays.
_VERSION = 1
_MODEL, _MODEL_VERSION = "/v1/models/<name>", "/v1/models/<name>/versions/<int:version>"
# These TensorFlow decodes in memory that goes with the size they state; of a GIF it unpacks every frame.
_BOUNDED = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
# Nothing comes from elsewhere, and nothing runs but page.js.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(classifier: Classifier, model_name: str, limits: admission.Limits, own_host: str | None) -> flask.Flask:
    """Makes the WSGI application.

    Args:
        classifier: the model.
        model_name: what TensorFlow Serving's clients call it.
        limits: of every request.
        own_host: as `admission.check_origin` takes it.
    """
    app = flask.Flask(__name__, static_folder="page", static_url_path="/page")
    app.config["MAX_CONTENT_LENGTH"] = limits.body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]  # The order of a signature's outputs is kept.
    app.before_request(lambda: admission.check_origin(flask.request, own_host))
    rate: list[Any] = [f"{limits.requests_per_second} per second"] if limits.requests_per_second else []
    limiter = Limiter(get_remote_address, app=app, application_limits=rate, storage_uri="memory://")
    gate = admission.Gate(limits)
    app.register_blueprint(_page_api(classifier, model_name, gate))
    app.register_blueprint(_serving_api(classifier, model_name, gate))

    @app.get("/")
    def _page() -> flask.Response:
        return app.send_static_file("index.html")

    @app.get("/healthz")
    @limiter.exempt
    def _health() -> dict[str, str]:
        return {"status": "ok"}

    @app.after_request
    def _secure(response: flask.Response) -> flask.Response:
        response.headers.update(_HEADERS)
        return response

    @app.errorhandler(RequestError)
    def _tell_request_error(error: RequestError) -> tuple[dict[str, str], int]:
        return {"error": " ".join(str(error).split())}, 400

    @app.errorhandler(HTTPException)
    def _tell(error: HTTPException) -> tuple[dict[str, str], int, list[tuple[str, str]]]:
        text, headers = error.description or error.name, [pair for pair in error.get_headers() if pair[0] != "Content-Type"]
        if isinstance(error, RequestEntityTooLarge):
            text = f"the request is larger than {limits.body_bytes / 2**20:g} MiB (--max_body_mb)"
        elif isinstance(error, TooManyRequests):
            text = f"more than {limits.requests_per_second} requests a second (--max_requests_per_second)"
            headers.append(("Retry-After", "1"))
        return {"error": text}, error.code or 500, headers

    return app


def _page_api(classifier: Classifier, model_name: str, gate: admission.Gate) -> flask.Blueprint:
    """What page.js asks for."""
    api = flask.Blueprint("page_api", __name__, url_prefix="/api")

    @api.get("/model")
    def _model() -> dict[str, Any]:
        model = classifier.model
        return {
            "model_name": model_name,
            "class_names": model.class_names,
            "input_shape": model.input_shape,
            "pictures": model.pictures,
            "limits": dataclasses.asdict(gate.limits),
        }

    @api.post("/predict")
    def _predict() -> dict[str, Any]:
        names, contents = _uploaded(flask.request)
        gate.check_number(len(contents))
        with gate.turn():
            gate.check_pictures(names, contents)
            files = zip(contents, names, strict=True)
            inputs = classifier.inputs(pictures.from_bytes(content, name, classifier.channels) for content, name in files)
            found = zip(names, classifier.classify(inputs), inputs, strict=True)
        return {"predictions": [{"file": name, **prediction, "input": _data_url(pixels)} for name, prediction, pixels in found]}

    return api


def _serving_api(classifier: Classifier, model_name: str, gate: admission.Gate) -> flask.Blueprint:
    """TensorFlow Serving's, of one model with one version."""
    api = flask.Blueprint("serving_api", __name__)

    def check_model(name: str, version: int) -> None:
        if name != model_name:
            raise NotFound(f"no model {name!r} here: this one is {model_name!r}")
        if version != _VERSION:
            raise NotFound(f"no version {version} here: the model has version {_VERSION} alone")

    @api.get(_MODEL)
    @api.get(_MODEL_VERSION)
    def _status(name: str, version: int = _VERSION) -> dict[str, Any]:
        check_model(name, version)
        status = {"error_code": "OK", "error_message": ""}
        return {"model_version_status": [{"version": str(_VERSION), "state": "AVAILABLE", "status": status}]}

    @api.get(_MODEL + "/metadata")
    @api.get(_MODEL_VERSION + "/metadata")
    def _metadata(name: str, version: int = _VERSION) -> dict[str, Any]:
        check_model(name, version)
        return {
            "model_spec": {"name": model_name, "signature_name": "", "version": str(_VERSION)},
            "metadata": {"signature_def": {"signature_def": classifier.signature_defs}},
        }

    @api.post(_MODEL + ":<method>")
    @api.post(_MODEL_VERSION + ":<method>")
    def _predict(name: str, method: str, version: int = _VERSION) -> dict[str, Any]:
        check_model(name, version)
        if method != "predict":
            raise BadRequest(f"no method {method!r} here: the model's signatures are for :predict")
        request = rest.parse(flask.request.get_data())
        inputs = rest.tensor(request, *classifier.input_of(request["signature_name"]))
        gate.check_number(len(inputs))
        with gate.turn():
            if inputs.dtype.hasobject:
                gate.check_pictures([f"picture {number}" for number in range(len(inputs))], inputs.tolist())
                inputs[:] = [_bounded(content, classifier.channels) for content in inputs]
            outputs = classifier.run(request["signature_name"], inputs)
        return rest.answer(request, outputs)

    return api


def _uploaded(request: flask.Request) -> tuple[list[str], list[bytes]]:
    """Names and contents of the files of a form, or of the one that is the whole body."""
    if request.mimetype != "multipart/form-data":
        return ["the picture"], [request.get_data()]
    files = [file for _, file in request.files.items(multi=True)]
    return [file.filename or "a picture" for file in files], [file.read() for file in files]


def _bounded(content: bytes, channels: int) -> bytes:
    """The picture upright, which TensorFlow does not see to, in a format that it decodes in bounded memory."""
    if content.startswith(_BOUNDED) and not pictures.is_turned(content):
        return content
    return pictures.png(pictures.from_bytes(content, "the picture", channels))


def _data_url(pixels: np.ndarray) -> str:
    """A model's input, float32 [H, W, C] in [0, 255], as a PNG for a page."""
    whole = pixels.round().astype(np.uint8)
    image = Image.fromarray(whole[..., 0] if whole.shape[2] == 1 else whole)
    return f"data:image/png;base64,{base64.b64encode(pictures.png(image)).decode()}"

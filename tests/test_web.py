"""What `serve` answers, asked without a process: photos, many classes, limits of a few pixels."""

import base64
import dataclasses
import io

import keras
import numpy as np
import pytest
from PIL import Image
from test_serve import png
from werkzeug.exceptions import ServiceUnavailable

from trainer import admission, export, web
from trainer.classifier import Classifier

LIMITS = admission.Limits(body_bytes=2**20, requests_per_second=0)


def test_predictions_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_CONCURRENT", 1)
    monkeypatch.setattr(admission, "_PATIENCE_SECS", 0.01)
    gate = admission.Gate(LIMITS)
    with gate.turn(), pytest.raises(ServiceUnavailable), gate.turn():
        pass
    with gate.turn():
        pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A model of colour photos, 24 x 16 pixels, of twelve classes of which ten have names."""
    image = keras.Input((16, 24, 3))
    model = keras.Model(image, keras.layers.Dense(12)(keras.layers.Flatten()(image / 255)))
    folder = tmp_path_factory.mktemp("photos")
    export.export(model, folder, tuple(f"clàss {number}" for number in range(10)), "photos")
    return Classifier(str(folder))


def test_photos_and_many_classes_work_too(photos: Classifier) -> None:
    client = web.create_app(photos, "photos", LIMITS, "127.0.0.1").test_client()
    described = client.get("/api/model").json
    assert described["pictures"] == "photos"
    assert described["input_shape"] == [16, 24, 3]
    assert described["class_names"][9:] == ["clàss 9", "10", "11"]
    content = png(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8))
    (found,) = client.post("/api/predict", data=content).json["predictions"]
    request = {"signature_name": "image_bytes", "instances": [{"b64": base64.b64encode(content).decode()}]}
    (served,) = client.post("/v1/models/photos:predict", json=request).json["predictions"]
    assert found["class_name"] == served["class_names"]
    assert found["probabilities"] == pytest.approx(served["probabilities"], abs=1e-4)
    seen = Image.open(io.BytesIO(base64.b64decode(found["input"].partition(",")[2])))
    assert (seen.mode, seen.size) == ("RGB", (24, 16))


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
def test_pictures_that_are_to_be_turned_are_turned_in_every_request(encoding: str, photos: Classifier) -> None:
    client = web.create_app(photos, "photos", LIMITS, "127.0.0.1").test_client()
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:, :12] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn clockwise to show.
    content = io.BytesIO()
    Image.fromarray(upright).rotate(90, expand=True).save(content, encoding, exif=exif)
    (found,) = client.post("/api/predict", data=content.getvalue()).json["predictions"]
    request = {"signature_name": "image_bytes", "instances": [{"b64": base64.b64encode(content.getvalue()).decode()}]}
    (served,) = client.post("/v1/models/photos:predict", json=request).json["predictions"]
    (plain,) = photos.classify(upright[None].astype(np.float32))
    assert found["probabilities"] == pytest.approx(plain["probabilities"], abs=0.02)
    assert served["probabilities"] == pytest.approx(plain["probabilities"], abs=0.02)


def test_many_small_pictures_are_given_to_the_model_a_few_at_a_time(photos: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, run = [], photos._run
    monkeypatch.setattr(photos, "_run", lambda *given: sizes.append(len(given[-1])) or run(*given))
    client = web.create_app(photos, "photos", LIMITS, "127.0.0.1").test_client()
    pixels = np.random.default_rng(0).integers(0, 255, (70, 2, 2, 3), np.uint8)
    contents = [base64.b64encode(png(one)).decode() for one in pixels]
    request = {"signature_name": "image_bytes", "instances": [{"b64": content} for content in contents]}
    served = client.post("/v1/models/photos:predict", json=request).json["predictions"]
    assert sizes == [32, 32, 6]
    for index in (0, 31, 32, 69):
        (alone,) = client.post("/api/predict", data=png(pixels[index])).json["predictions"]
        assert served[index]["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-4)


@pytest.mark.parametrize("encoding", ["GIF", "BMP", "WEBP"])
def test_bytes_in_any_format_are_classified(encoding: str, photos: Classifier) -> None:
    client = web.create_app(photos, "photos", LIMITS, "127.0.0.1").test_client()
    content = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 30, 90)).save(content, encoding)
    request = {"signature_name": "image_bytes", "inputs": [{"b64": base64.b64encode(content.getvalue()).decode()}]}
    served = client.post("/v1/models/photos:predict", json=request).json["outputs"]
    (found,) = client.post("/api/predict", data=content.getvalue()).json["predictions"]
    assert found["probabilities"] == pytest.approx(served["probabilities"][0], abs=1e-4)


def test_pixels_of_all_pictures_of_a_request_count(photos: Classifier) -> None:
    limits = dataclasses.replace(LIMITS, pixels=3 * 30 * 30)
    client = web.create_app(photos, "photos", limits, "127.0.0.1").test_client()
    content = png(np.zeros((30, 30, 3), np.uint8))
    for number, status in ((3, 200), (4, 400)):
        files = [(io.BytesIO(content), f"{index}.png") for index in range(number)]
        assert client.post("/api/predict", data={"files": files}).status_code == status


def test_defect_is_no_traceback_for_the_client(photos: Classifier, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    client = web.create_app(photos, "photos", LIMITS, "127.0.0.1").test_client()
    monkeypatch.setattr(photos, "classify", lambda inputs: 1 / 0)
    response = client.post("/api/predict", data=png(np.zeros((30, 30, 3), np.uint8)))
    assert response.status_code == 500
    assert "ZeroDivisionError" not in response.text
    assert response.json.keys() == {"error"}
    assert "ZeroDivisionError" in caplog.text

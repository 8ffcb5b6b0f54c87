"""Classification of pictures of any size and polarity, and the evaluation of a finished job."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments, write_dataset
from PIL import Image

from trainer import classifier, evaluate, images, pictures, predict, serve
from trainer.errors import RequestError
from trainer.export import export
from trainer.images import gray_from_bytes, to_model_input


@pytest.fixture(scope="module")
def model_dir(made_once) -> Path:
    """A model trained for 150 steps on all of MNIST: good enough to read clean digits, however its CPU rounds."""

    def make(folder: Path) -> None:
        options = {**TINY, "model_dir": folder, "max_steps": 150, "global_batch_size": 256, "steps_per_loop": 50,
                   "augment": "affine"}  # fmt: skip
        subprocess.run([sys.executable, "-m", "trainer.task", *arguments(options)], cwd=ROOT, check=True, capture_output=True)

    return made_once("model", make)


@pytest.fixture(scope="module")
def digits(mnist) -> list[tuple[np.ndarray, int]]:
    """The first of each of ten digits of the test set."""
    return [
        (mnist.test.images[index, ..., 0], digit) for digit in range(10) for index in [int(np.argmax(mnist.test.labels == digit))]
    ]


def draw(pixels: np.ndarray, kind: str) -> Image.Image:
    """A digit as people bring it."""
    image = Image.fromarray(pixels)
    large = image.resize((280, 280), Image.Resampling.BICUBIC)
    if kind == "same":
        return image
    if kind == "dark on light":
        return Image.fromarray(255 - pixels)
    if kind == "large":
        return large
    if kind == "photo":  # Dark blue on beige, wide, off centre, with noise.
        canvas = np.full((400, 700, 3), (235, 225, 205), np.float32)
        ink = np.asarray(large, np.float32)[..., None] / 255
        canvas[60:340, 350:630] = canvas[60:340, 350:630] * (1 - ink) + np.array([30, 40, 120]) * ink
        canvas += np.random.default_rng(0).normal(0, 4, canvas.shape)
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if kind == "half in the shade":
        canvas = np.full((400, 700), 255, np.float32)
        canvas[60:340, 350:630] -= np.asarray(large)
        canvas *= np.linspace(0.65, 0.95, 700)
        canvas += np.random.default_rng(0).normal(0, 4, canvas.shape)
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if kind == "transparent":  # Black ink, nothing behind it.
        rgba = np.zeros((280, 280, 4), np.uint8)
        rgba[..., 3] = np.asarray(large)
        return Image.fromarray(rgba)
    if kind == "palette":
        return large.convert("P")
    if kind == "16 bit":
        return Image.fromarray(np.asarray(large).astype(np.uint16) * 257)
    assert kind == "one bit"
    return large.point(lambda value: 255 * (value > 100)).convert("1")


KINDS = ["same", "dark on light", "large", "photo", "half in the shade", "transparent", "palette", "16 bit", "one bit"]


@pytest.mark.parametrize("kind", ["photo", "half in the shade"])
def test_paper_is_as_black_as_that_of_clean_pictures(kind: str, digits) -> None:
    for pixels, _ in digits:
        clean, seen = (
            to_model_input(np.asarray(draw(pixels, one).convert("L"), np.float32), 28, 28).numpy() for one in ("large", kind)
        )
        assert seen[clean == 0].mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_read_from_pictures_of_every_kind(kind: str, digits, model_dir: Path, tmp_path: Path) -> None:
    paths = []
    for pixels, digit in digits:
        paths.append(tmp_path / f"{digit}.png")
        draw(pixels, kind).save(paths[-1])
    plain = list(predict.predict(str(model_dir), paths))
    right = sum(prediction["digit"] == digit for prediction, (_, digit) in zip(plain, digits, strict=True))
    assert right >= 9, [(prediction["digit"], round(prediction["probability"], 2)) for prediction in plain]


def test_many_pictures_are_classified_some_at_a_time(digits, model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    paths = []
    for pixels, digit in digits:
        paths.append(tmp_path / f"{digit}.png")
        draw(pixels, "same").save(paths[-1])
    at_once = list(predict.predict(str(model_dir), paths))
    classify, sizes = classifier.Classifier.classify, []

    def counting(self: classifier.Classifier, inputs: np.ndarray) -> list[dict[str, Any]]:
        sizes.append(len(inputs))
        return classify(self, inputs)

    monkeypatch.setattr(classifier.Classifier, "classify", counting)
    monkeypatch.setattr(predict, "_BATCH", 4)
    some = list(predict.predict(str(model_dir), paths))
    assert sizes == [4, 4, 2]
    assert [(one["file"], one["digit"]) for one in some] == [(one["file"], one["digit"]) for one in at_once]


def test_jpeg_and_its_orientation_are_understood(digits, model_dir: Path, tmp_path: Path) -> None:
    picture = draw(digits[7][0], "large").rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn clockwise to show.
    picture.save(tmp_path / "seven.jpg", exif=exif)
    assert next(predict.predict(str(model_dir), [tmp_path / "seven.jpg"]))["digit"] == 7


@pytest.mark.parametrize("kind", ["same", "dark on light", "large", "photo", "transparent"])
def test_command_and_exported_signature_see_the_same(kind: str, digits, tmp_path: Path) -> None:
    draw(digits[5][0], kind).save(tmp_path / "a.png")
    ours = to_model_input(tf.constant(np.asarray(pictures.load(tmp_path / "a.png", 1), np.float32)), 28, 28)
    exported = to_model_input(gray_from_bytes(tf.constant((tmp_path / "a.png").read_bytes())), 28, 28)
    np.testing.assert_allclose(ours, exported, atol=1)


def test_picture_of_the_networks_size_is_left_alone(digits) -> None:
    pixels = digits[3][0].astype(np.float32)
    np.testing.assert_array_equal(to_model_input(tf.constant(pixels), 28, 28)[..., 0], pixels)
    np.testing.assert_array_equal(to_model_input(tf.constant(255 - pixels), 28, 28)[..., 0], pixels)


def test_enlarged_digits_come_back_to_their_place(mnist) -> None:
    """Whole pixels of rounding, but no bias: half a pixel to one side costs a model of 98.8 % nearly a point."""
    originals = mnist.test.images[:50, ..., 0]
    large = [np.asarray(Image.fromarray(pixels).resize((140, 140)), np.float32) for pixels in originals]
    found = np.stack([to_model_input(tf.constant(picture), 28, 28)[..., 0] for picture in large])

    def centers(images: np.ndarray) -> np.ndarray:
        total = images.sum(axis=(1, 2), dtype=np.float64)
        return np.stack([images.sum(axis=axis) @ np.arange(28) / total for axis in (2, 1)], axis=1)

    moved = centers(found) - centers(originals)
    assert np.abs(moved.mean(axis=0)).max() < 0.15
    assert np.abs(moved).max() < 1.1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_empty_page_is_no_accident(value: int) -> None:
    found = to_model_input(tf.fill([90, 60], float(value)), 28, 28).numpy()
    assert np.isfinite(found).all()
    assert found.shape == (28, 28, 1)


def test_command_prints_a_line_an_image(digits, model_dir: Path, tmp_path: Path) -> None:
    draw(digits[1][0], "photo").save(tmp_path / "one.png")
    command = [sys.executable, "-m", "trainer.predict", f"--model_dir={model_dir}", str(tmp_path / "one.png")]
    plain = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert plain.stdout.startswith(f"{tmp_path / 'one.png'}: 1  (")
    assert plain.stderr == ""
    done = subprocess.run([*command, "--format=json"], cwd=ROOT, capture_output=True, text=True, check=True)
    prediction = json.loads(done.stdout)
    assert prediction["digit"] == 1
    assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-3)


def test_unusable_files_end_the_command_before_any_output_or_are_left_out(digits, model_dir: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "one.png", tmp_path / "broken.png"
    Image.fromarray(digits[1][0]).save(good)
    bad.write_bytes(good.read_bytes()[:100])
    command = [sys.executable, "-m", "trainer.predict", f"--model_dir={model_dir}", str(good), str(bad), str(good)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    done = subprocess.run([*command, "--on_error=skip"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [str(good)] * 2
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"trainer.predict: left out: {bad}: ")
    with pytest.raises(RequestError, match="not one of the files is a usable picture"):
        list(predict.predict(str(model_dir), [bad, bad], "skip"))


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        ("predict", ["a.png"], "--model_dir must be given"),
        ("predict", ["--model_dir=/nowhere"], "no image given"),
        ("predict", ["--model_dir=/nowhere", "{image}"], "no finished job"),
        ("evaluate", [], "--model_dir must be given"),
        ("evaluate", ["--model_dir=/nowhere"], "no finished job"),
        ("evaluate", ["--model_dir=/nowhere", "--data_dir=/nowhere"], "no finished job"),
        ("evaluate", ["--model_dir=/nowhere", "--format=xml"], "--format"),
    ],
)
def test_wrong_request_is_one_line_and_exit_code_2(program: str, argv: list[str], words: str, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    given = [argument.format(image=tmp_path / "a.png") for argument in argv]
    done = subprocess.run(
        [sys.executable, "-m", f"trainer.{program}", *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_job_that_has_not_finished_is_told_before_tensorflow_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # To import it fails then.
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with socket.socket() as listener:
        commands: list[Callable[[], object]] = [
            lambda: list(predict.predict(str(tmp_path), [])),
            lambda: evaluate.evaluate(str(tmp_path)),
            lambda: serve.serve(str(tmp_path), listener, "127.0.0.1", "digits", 1, 0),
        ]
        for command in commands:
            with pytest.raises(RequestError, match="no finished job there"):
                command()


def test_data_that_is_not_there_is_told_before_tensorflow_is_loaded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(RequestError, match="nowhere: there is no such file or folder"):
        evaluate.evaluate(str(finished), "nowhere")


def test_data_of_a_run_whose_configuration_is_lost_is_not_guessed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(RequestError, match=r"its config\.json, which names its data, cannot be read: give --data_dir"):
        evaluate.evaluate(str(tmp_path / "run"))


def test_gray_arrays_that_are_no_digits_are_only_scaled_if_asked_for(digits, model_dir: Path, tmp_path: Path) -> None:
    draw(digits[1][0], "dark on light").save(tmp_path / "one.png")
    as_digit, as_photo = (
        next(predict.predict(str(model_dir), [tmp_path / "one.png"], shown=shown))["probabilities"] for shown in ("", "photos")
    )
    given = np.asarray(pictures.load(tmp_path / "one.png", 1), np.float32)[np.newaxis, ..., np.newaxis]
    pixels = images.scaled(tf.constant(given), 28, 28).numpy()
    model = keras.models.load_model(model_dir / "model.keras", compile=False)
    np.testing.assert_allclose(as_photo, tf.nn.softmax(model(pixels))[0], atol=1e-4)
    assert as_digit != as_photo


def test_digits_are_not_looked_for_in_coloured_pictures(tmp_path: Path) -> None:
    colours = keras.Input((12, 12, 3))
    model = keras.Model(colours, keras.layers.Dense(2)(keras.layers.Flatten()(colours)))
    export(model, tmp_path, ("a", "b"), "photos")
    assert classifier.Classifier(str(tmp_path)).inputs([Image.new("RGB", (20, 20))]).shape == (1, 12, 12, 3)
    with pytest.raises(RequestError, match="--pictures=digits: the model takes coloured pictures"):
        classifier.Classifier(str(tmp_path), "digits")


def test_evaluation_goes_by_the_names_of_classes(model_dir: Path, mnist, tmp_path: Path) -> None:
    """The folders 3 and 7 alone are labels 0 and 1 there, and digits all the same."""
    for split in ("train", "test"):
        for digit in (3, 7):
            for number, pixels in enumerate(mnist.test.images[mnist.test.labels == digit][:20, ..., 0]):
                path = tmp_path / "data" / split / str(digit) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    whole = evaluate.evaluate(str(model_dir), str(tmp_path / "data"))
    assert whole["test_accuracy"] > 0.8
    assert evaluate.evaluate(str(model_dir), str(tmp_path / "data" / "test")) == whole, "new examples alone"
    (tmp_path / "data" / "train" / "3" / "0.png").write_bytes(b"nothing")
    assert evaluate.evaluate(str(model_dir), str(tmp_path / "data")) == whole, "which are not read"
    (tmp_path / "data" / "train" / "3").rename(tmp_path / "data" / "train" / "three")
    (tmp_path / "data" / "test" / "3").rename(tmp_path / "data" / "test" / "three")
    with pytest.raises(RequestError, match="has the class three, the model only 0, 1, 2"):
        evaluate.evaluate(str(model_dir), str(tmp_path / "data"))


def test_dark_pictures_are_not_made_bright(digits, model_dir: Path) -> None:
    """The exported signature takes floats up to 1 for scaled ones; a picture's are known not to be."""
    reader = classifier.Classifier(str(model_dir))
    dark = digits[3][0][np.newaxis, ..., np.newaxis] / 255 > 0.5
    expected = reader.run("serving_uint8", dark.astype(np.uint8))["probabilities"]
    bright = reader.run("serving_uint8", 255 * dark.astype(np.uint8))["probabilities"]
    found = reader.classify(dark.astype(np.float32))[0]["probabilities"]
    np.testing.assert_allclose(found, expected[0], atol=1e-5)
    assert np.abs(bright - expected).max() > 0.1
    # A little above 1, as after resizing, is still the scale of 1.
    scaled = np.where(dark, 1.002, 0).astype(np.float32)
    np.testing.assert_allclose(reader.run("serving_default", scaled)["probabilities"], bright, atol=0.01)
    # PyTorch's way to scale MNIST, values stretched beyond 1, and from -1 to 1.
    for pixels in ((dark - 0.1307) / 0.3081, dark * 1.5, 2.0001 * dark - 1, dark * 300.0):
        with pytest.raises(RequestError, match="expected pixels from 0 to 255, or from 0 to 1; these go from"):
            reader.run("serving_default", pixels.astype(np.float32))


@pytest.mark.parametrize("kind", ["csv", "npz", "idx", "folders of colour"])
def test_a_test_set_alone_is_evaluated(kind: str, model_dir: Path, mnist, tmp_path: Path) -> None:
    """Of one class even."""
    threes = mnist.test.images[mnist.test.labels == 3][:20, ..., 0]
    labels = np.full(20, 3, np.uint8)
    given = tmp_path
    if kind == "npz":
        given = tmp_path / "data.npz"
        np.savez(given, x_test=threes, y_test=labels)
    elif kind == "idx":
        write_dataset(tmp_path, (threes, labels), (threes, labels), zipped=False)
        (tmp_path / "train-images-idx3-ubyte").unlink()
        (tmp_path / "train-labels-idx1-ubyte").unlink()
    else:
        (tmp_path / "3").mkdir()
        for number, pixels in enumerate(threes):
            Image.fromarray(pixels).convert("L" if kind == "csv" else "RGB").save(tmp_path / "3" / f"{number}.png")
        if kind == "csv":
            rows = "".join(f"3/{number}.png,3,test\n" for number in range(20))
            given = tmp_path / "list.csv"
            given.write_text(f"path,label,split\n{rows}")
    found = evaluate.evaluate(str(model_dir), str(given))
    assert found["test_examples"] == 20
    assert found["test_accuracy"] > 0.8


def test_evaluation_is_of_the_jobs_own_data_unless_another_is_named(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    own = evaluate.evaluate(str(finished))
    assert own["test_examples"] == 203
    assert own["test_accuracy"] == pytest.approx(result["test_accuracy"])
    assert evaluate.evaluate(str(finished), "")["test_examples"] == 10_000

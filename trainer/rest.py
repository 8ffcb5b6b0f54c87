"""The JSON of TensorFlow Serving's predict API, to tensors and back: https://www.tensorflow.org/tfx/serving/api_rest.

A request has its examples one by one ("instances") or as one tensor ("inputs"); the answer has the same form. Signatures of
digitfleet take one named tensor. Unlike there, what is not finite is refused: it would come back as a class.
"""

import base64
import binascii
import json
from typing import Any

import numpy as np

from trainer.errors import RequestError

_DEFAULT_SIGNATURE = "serving_default"


def parse(body: bytes) -> dict[str, Any]:
    """Reads a request.

    Returns:
        The JSON object, with either "instances" or "inputs", and "signature_name".

    Raises:
        RequestError: it is none.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"the body must be a JSON object, this is {_kind(request)}")
    if ("instances" in request) == ("inputs" in request):
        raise RequestError('the request needs either "instances" (a list of examples) or "inputs" (a tensor)')
    # TensorFlow Serving takes an empty name as none.
    name = request.get("signature_name") or _DEFAULT_SIGNATURE
    if not isinstance(name, str):
        raise RequestError(f'"signature_name" must be a string, this is {_kind(name)}')
    return {**request, "signature_name": name}


def tensor(request: dict[str, Any], name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """The input that a request carries.

    Args:
        request: what `parse` gave.
        name: of the signature's input.
        dtype: of the signature's input; object stands for strings.
        shape: of the signature's input; None is any number, the first is that of examples.

    Returns:
        An array of that dtype and shape; of strings, their bytes.

    Raises:
        RequestError: the values do not fit the signature.
    """
    if "instances" in request:
        value = request["instances"]
        if not isinstance(value, list):
            raise RequestError(f'"instances" must be a list, this is {_kind(value)}')
        value = [_unnamed(example, name) for example in value]
    else:
        value = _unnamed(request["inputs"], name)
    array = _strings(value) if dtype.hasobject else _numbers(value, dtype)
    if array.ndim != len(shape) or any(size not in (None, found) for size, found in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        raise RequestError(f"{name} must have the shape [{wanted}], this has {list(array.shape)}")
    if not len(array):
        raise RequestError("no examples given")
    return array


def answer(request: dict[str, Any], outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The body of the response.

    Args:
        request: what `parse` gave.
        outputs: arrays [N, ...] by the names of the signature's outputs; strings as bytes.
    """
    values = {name: _plain(array) for name, array in outputs.items()}
    if "inputs" in request:
        return {"outputs": next(iter(values.values())) if len(values) == 1 else values}
    if len(values) == 1:
        return {"predictions": next(iter(values.values()))}
    return {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]}


def _unnamed(value: Any, name: str) -> Any:
    """Takes the input's name away where it is given."""
    if not isinstance(value, dict) or value.keys() == {"b64"}:
        return value
    if value.keys() != {name}:
        raise RequestError(f"the signature has the input {name!r} alone, this has {', '.join(map(repr, value)) or 'none'}")
    return value[name]


def _strings(value: Any) -> np.ndarray:
    if not isinstance(value, list):
        return np.array(_bytes(value), object)
    array = np.empty(len(value), object)
    array[:] = [_bytes(item) for item in value]
    return array


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not isinstance(value, dict) or value.keys() != {"b64"} or not isinstance(value["b64"], str):
        raise RequestError(f'expected a string or {{"b64": "..."}}, this is {_kind(value)}')
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f'"b64" is no base64: {error}') from error


def _numbers(value: Any, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RequestError("lists of one level must be of one length") from error
    if not array.size:
        return array.astype(dtype)
    integer = np.issubdtype(dtype, np.integer)
    if array.dtype.kind not in ("iu" if integer else "iuf"):
        raise RequestError(f"expected {'whole numbers' if integer else 'numbers'} alone in lists that are nested alike")
    if integer and (array.min() < np.iinfo(dtype).min or array.max() > np.iinfo(dtype).max):
        raise RequestError(f"expected numbers from {np.iinfo(dtype).min} to {np.iinfo(dtype).max}")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise RequestError("NaN and infinite numbers cannot be classified")
    return array


def _plain(array: np.ndarray) -> list[Any]:
    return [value.decode() for value in array.tolist()] if array.dtype.hasobject else array.tolist()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

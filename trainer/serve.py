"""Classifies drawn digits and picture files in a browser: `python -m trainer.serve --model_dir runs/my-run`.

The same address answers clients of TensorFlow Serving's REST API. Without authentication: see `--host`.
"""

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from trainer import cli, storage
from trainer.errors import EXIT_FINISHED, RequestError

_THREADS = 8
# What is a little too large is refused in JSON; only what is much too large is not even read.
_SLACK_BYTES = 2**20


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        RequestError: it cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # A name that can be none at all is a UnicodeError.
        # Python adds the address, which is said already.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise RequestError(f"--host={host} --port={port}: cannot listen there ({reason}): choose another, or --port=0") from error


def serve(
    model_dir: str, listener: socket.socket, host: str, model_name: str, max_body_mb: int, max_rate: int, shown: str = ""
) -> None:
    """Serves until SIGTERM or SIGINT; requests that are being answered are finished. Call it in the main thread.

    Args:
        model_dir: folder of a finished job.
        listener: where.
        host: by which the listener was asked for.
        model_name: what TensorFlow Serving's clients call the model.
        max_body_mb: the largest body of a request, MiB.
        max_rate: requests a second of a client; 0: any number.
        shown: "digits" or "photos"; empty for what the training images show.

    Raises:
        RequestError: there is no export, or it cannot be read, or its pictures cannot show that.
    """
    storage.export_of(model_dir)  # What is not there is told before TensorFlow is imported.
    with cli.quiet_start():
        import waitress

        from trainer import admission, web
        from trainer.classifier import Classifier

        classifier = Classifier(model_dir, shown)
    classifier.warm_up()
    address, port = listener.getsockname()[:2]
    own_host: str | None = host
    if not admission.is_loopback(address):
        own_host = None
        line = f"--host={host}: whoever reaches this machine can use the model: there is no authentication"
        print(f"trainer.serve: {line}", file=sys.stderr, flush=True)
    limits = admission.Limits(body_bytes=max_body_mb * 2**20, requests_per_second=max_rate)
    # That requests wait for a thread is no news.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = waitress.create_server(
        web.create_app(classifier, model_name, limits, own_host),
        sockets=[listener],
        threads=_THREADS,
        max_request_body_size=limits.body_bytes + _SLACK_BYTES,
        ident=None,
    )
    _on_signal(sys.exit)
    name = host or address
    print(f"trainer.serve: {model_name} on http://{f'[{name}]' if ':' in name else name}:{port}/", flush=True)
    server.run()


def _on_signal(act: Callable[[], Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: act())


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    own: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    flags.DEFINE_string("model_dir", None, "Folder of a finished job.", **own)
    flags.DEFINE_enum(
        "pictures", None, ["digits", "photos"],
        "What pictures show, as for trainer.predict. `image_bytes` of the REST API keeps to what the training set said.", **own,
    )  # fmt: skip
    flags.DEFINE_string("host", "127.0.0.1", "Name or address to listen on; 0.0.0.0 is every network. No authentication.", **own)
    flags.DEFINE_integer("port", 8501, "Port to listen on. 0: any that is free.", 0, 65535, **own)
    flags.DEFINE_string("model_name", "digitfleet", "The model's name in the addresses of TensorFlow Serving's REST API.", **own)
    flags.DEFINE_integer("max_body_mb", 8, "Largest body of a request, MiB.", 1, 1024, **own)
    flags.DEFINE_integer("max_requests_per_second", 50, "Requests a second of one client. 0: any number.", 0, **own)


def main(_: list[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    values = flags.FLAGS
    if not values.model_dir:
        raise RequestError("--model_dir must be given: the folder of a finished job")
    if not re.fullmatch(r"[\w.-]+", values.model_name, re.ASCII):
        raise RequestError(f"--model_name={values.model_name}: expected letters, digits, '.', '_' and '-'")
    # Nothing is served yet, and an exception could get lost in TensorFlow's import.
    _on_signal(lambda: os._exit(EXIT_FINISHED))
    with listen(values.host, values.port) as listener:
        serve(
            values.model_dir,
            listener,
            values.host,
            values.model_name,
            values.max_body_mb,
            values.max_requests_per_second,
            values.pictures or "",
        )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.serve", main, flags_only=True)

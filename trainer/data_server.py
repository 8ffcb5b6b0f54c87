"""One server of tf.data service: the dispatcher, or a worker that reads and decodes records for `trainer.task --data_service`.

    python -m trainer.data_server --port 5050                                                       # the dispatcher
    python -m trainer.data_server --port 5051 --dispatcher grpc://HOST:5050 --address THIS_HOST     # as many as wanted

They hold nothing that is lost with them: see `service.py`. Data workers need the data set under the same path as the job.
TensorFlow's servers listen on every interface, without authentication: keep them inside a trusted network.
"""

import os
import signal
import socket
import sys
import threading
from typing import Any

from absl import flags

from trainer import cli
from trainer.errors import EXIT_FINISHED, RequestError, Stopped
from trainer.storage import reason_of

_LONGEST_JOB_PAUSE_MS = 60_000
_PATIENCE_SECS = 300.0


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    own: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    flags.DEFINE_integer("port", 5050, "Port to listen on.", 1, 65535, **own)
    flags.DEFINE_string("dispatcher", "", "grpc://HOST:PORT of the dispatcher. Empty: this is the dispatcher.", **own)
    flags.DEFINE_string(
        "address", None, "Host name or address by which training workers reach this data worker; localhost if not given.", **own
    )


def main(_: list[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    values = flags.FLAGS
    if values.address and not values.dispatcher:
        raise RequestError(f"--address={values.address}: a data worker's, which needs --dispatcher; a dispatcher has none")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with cli.quiet_start():
        import tensorflow as tf

        from trainer import service
    # Reading needs no GPU, and the job needs all of its memory.
    tf.config.set_visible_devices([], "GPU")
    served = tf.data.experimental.service
    try:
        if values.dispatcher:
            try:
                service.check(values.dispatcher, _PATIENCE_SECS, flag="--dispatcher", stopped=ended.is_set)
            except Stopped:
                if ended.is_set():
                    return
                raise
            # As a pod's address in a cluster of IPv6.
            address = values.address or "localhost"
            host = f"[{address}]" if ":" in address else address
            config = served.WorkerConfig(
                dispatcher_address=values.dispatcher.removeprefix("grpc://"),
                worker_address=f"{host}:{values.port}",
                port=values.port,
            )
            _server = served.WorkerServer(config)
        else:
            # gRPC would share it with a dispatcher that is there already.
            socket.create_server(("", values.port)).close()
            _server = served.DispatchServer(served.DispatcherConfig(port=values.port, job_gc_timeout_ms=_LONGEST_JOB_PAUSE_MS))
    except OSError as error:
        raise Stopped(f"--port={values.port}: cannot serve there: {error.strerror}") from error
    except tf.errors.OpError as error:
        raise Stopped(f"--port={values.port}: cannot serve there: {reason_of(error)}") from error
    role = f"data worker of {values.dispatcher}" if values.dispatcher else "dispatcher"
    print(f"trainer.data_server: {role}, on port {values.port}", flush=True)
    while not ended.wait(1.0):
        pass
    # Nothing is to be saved. TensorFlow 2.21's end of a data worker looks for a dispatcher that may have ended before, and holds
    # Python's lock for the minute that it does.
    os._exit(EXIT_FINISHED)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.data_server", main, flags_only=True)

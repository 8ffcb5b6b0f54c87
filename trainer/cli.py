"""What all commands share: parsing absl flags, one line for what the user can mend, and the exit code of each end."""

import contextlib
import logging as standard_logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from trainer import cluster
from trainer import flags as task_flags
from trainer.errors import EXIT_FINISHED, JobError

# 128 + SIGINT, as shells have it.
_EXIT_INTERRUPTED = 130


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """Runs `main` with the arguments that are no flags, and exits. Defects keep their traceback and exit with 1."""
    app.define_help_flags()
    try:
        positional = task_flags.parse(flags.FLAGS, sys.argv)[1:]
    except JobError as error:
        _end(program, error)
    except SystemExit as error:
        # absl ends --help with 1, although nothing is wrong.
        sys.exit(EXIT_FINISHED if error.code == 1 else error.code)
    _log_plainly(program)
    try:
        main(positional)
    except JobError as error:
        _end(program, error)
    except KeyboardInterrupt:
        # Of a program that does not listen for the signal itself.
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(_EXIT_INTERRUPTED)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Keeps TensorFlow's start-up noise off stderr unless --verbosity=0 or more asks for it; import TensorFlow inside.

    Some of it is written before TensorFlow has read its log level, so stderr itself is set aside. It comes back whole
    when the import fails.
    """
    cluster.set_log_level(logging.get_verbosity())
    if logging.get_verbosity() >= logging.INFO:
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except JobError:
            raise
        except BaseException:
            aside.seek(0)
            os.write(stderr, aside.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _end(program: str, error: JobError) -> None:
    line = " ".join(str(error).split())
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _log_plainly(program: str) -> None:
    """Sends our own log to stderr as plain lines; TensorFlow's stays with absl and its --verbosity."""
    handler = standard_logging.StreamHandler(sys.stderr)
    handler.setFormatter(standard_logging.Formatter(f"{program}: %(message)s"))
    log = standard_logging.getLogger("digitfleet")
    log.handlers, log.propagate = [handler], False
    log.setLevel(standard_logging.INFO)
    logging.use_absl_handler()

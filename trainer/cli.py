"""What all commands share: parsing absl flags, one line for what the user can mend, and the exit code of each end."""

import contextlib
import gc
import io
import logging as standard_logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from trainer import cluster
from trainer import flags as task_flags
from trainer.errors import EXIT_DEFECT, EXIT_FINISHED, EXIT_REQUEST, JobError, RequestError

# 128 + SIGINT, as shells have it.
_EXIT_INTERRUPTED = 130
# Keras 3.15 imports the first two for pictures and wrappers, TensorFlow 2.21 the third for its lite converter; they do without
# what is missing. Nothing here uses those, and the imports take a quarter of the CPU time of TensorFlow's own, JAX's a tenth
# where it is installed. What splits or draws imports them then, as a user's module may.
_NOT_FOR_TENSORFLOW = ("matplotlib", "sklearn", "jax")

# Of absl's own `app.run`, which is not used here.
_NOT_HONOURED = (
    "log_dir",
    "only_check_args",
    "pdb",
    "pdb_post_mortem",
    "profile_file",
    "run_with_pdb",
    "run_with_profiling",
    "use_cprofile_for_profiling",
)


def run(
    program: str, main: Callable[[list[str]], None], *, flags_only: bool = False, at_once: bool = False, example: str = ""
) -> None:
    """Runs `main` with the arguments that are no flags, and exits. Defects keep their traceback and exit with 1.

    Args:
        program: its name, for messages.
        main: the program.
        flags_only: whether it takes no other arguments.
        at_once: ends the process without Python's and TensorFlow's own end. TensorFlow 2.21 waits there for threads of input
            pipelines, up to a minute for each: see `tracing.untuned`. tf.distribute's own, one for each device, are tuned still.
        example: of a command with flags of trainer.task behind `--`, for a program that takes such.
    """
    app.define_help_flags()
    for name in _NOT_HONOURED:
        if name in flags.FLAGS:
            delattr(flags.FLAGS, name)
    # Python has none where they are closed, as after `>&-`.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may be bytes that are no text, or text that the locale does not know; stderr is like that anyway.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        elsewhere = f"is a flag of trainer.task: those go behind `--`, as in python -m {example}"
        positional = task_flags.parse(flags.FLAGS, sys.argv, task_flags.NAMES if example else (), elsewhere)[1:]
    except JobError as error:
        _tell(program, error)
        sys.exit(error.exit_code)
    except OSError as error:
        # A reader of --help that has seen enough.
        _tell(program, _unwritable(error))
        _exit(EXIT_REQUEST, at_once=False)
    except SystemExit as error:
        # absl ends --help with 1, although nothing is wrong.
        _exit(EXIT_FINISHED if error.code == 1 else int(error.code or EXIT_FINISHED), at_once=False)
    _log_plainly(program)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if flags_only and positional:
            raise RequestError(f"unexpected argument {positional[0]!r}: expected flags only")
        main(positional)
    except JobError as error:
        _tell(program, error)
        _exit(error.exit_code, at_once)
    except KeyboardInterrupt:
        # Of a program that does not listen for the signal itself.
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(_EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        _exit(EXIT_DEFECT, at_once)
    _exit(EXIT_FINISHED, at_once)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Loads TensorFlow, and keeps its start-up noise off stderr unless --verbosity=0 or more asks for it.

    Some of it is written before TensorFlow has read its log level, so stderr itself is set aside. It comes back whole
    when the import fails.
    """
    cluster.set_tensorflow_defaults(logging.get_verbosity())
    if logging.get_verbosity() >= logging.INFO:
        _import_tensorflow()
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            _import_tensorflow()
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


def _import_tensorflow() -> None:
    absent = [name for name in _NOT_FOR_TENSORFLOW if name not in sys.modules]
    for name in absent:
        # To import it fails then: https://docs.python.org/3/reference/import.html#the-module-cache
        sys.modules[name] = None  # type: ignore[assignment]
    # The import makes a million objects that all stay: the collector would search them time and again, now and later.
    gc.disable()
    try:
        import tensorflow  # noqa: F401

        gc.freeze()
    finally:
        gc.enable()
        for name in absent:
            del sys.modules[name]


def show(line: str) -> None:
    """Prints a line that was asked for.

    Raises:
        RequestError: nobody can read it: the disk is full, or the reader has gone.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> RequestError:
    return RequestError(f"what is printed cannot be written: {error.strerror}")


def _tell(program: str, error: JobError) -> None:
    line = " ".join(str(error).split())
    try:
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # The exit code stands where nothing can be said, as on a full disk; Python would try again at its end, and change it.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _exit(code: int, at_once: bool) -> NoReturn:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        # What was to be shown is a part of what was asked for.
        code = code or EXIT_DEFECT
        # Python would try again at its end, and exit with 120: https://docs.python.org/3/library/signal.html#note-on-sigpipe
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if at_once:
        standard_logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        # AutoGraph's, of what Keras and tf.distribute trace; Python's own end would take them away.
        for module in [found for name, found in sys.modules.items() if name.startswith("__autograph_generated_file")]:
            for path in filter(None, (module.__file__, module.__cached__)):
                with contextlib.suppress(OSError):
                    Path(path).unlink()
        os._exit(code)
    sys.exit(code)


def _log_plainly(program: str) -> None:
    """Sends our own log to stderr as plain lines; TensorFlow's stays with absl and its --verbosity."""
    handler = standard_logging.StreamHandler(sys.stderr)
    handler.setFormatter(standard_logging.Formatter(f"{program}: %(message)s"))
    log = standard_logging.getLogger("digitfleet")
    log.handlers, log.propagate = [handler], False
    log.setLevel(standard_logging.INFO)
    logging.use_absl_handler()

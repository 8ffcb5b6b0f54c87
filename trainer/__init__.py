"""digitfleet's training job: one result on any number of devices."""

import signal
import sys

__version__ = "0.1.0"

# While Python looks for the module of `-m`, argv[0] is that: https://docs.python.org/3/using/cmdline.html#cmdoption-m
_is_program = sys.argv[:1] == ["-m"] and any(argument.startswith(("trainer.", "launch.")) for argument in sys.orig_argv)
if _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while a program loads ends it without a traceback; `cli.run` takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

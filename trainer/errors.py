"""The ways a job ends before it is finished, and the exit code of each.

Code raises one of these where it understands what went wrong; `cli.run` alone turns them into exit codes.
"""

EXIT_FINISHED = 0
EXIT_DEFECT = 1
EXIT_REQUEST = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start me again and I go on.


class JobError(Exception):
    """A known end of a job. The message is one line that says what is wrong and how to mend it."""

    exit_code = EXIT_DEFECT


class RequestError(JobError):
    """The request cannot be met: a flag, the configuration, data, storage or the cluster description."""

    exit_code = EXIT_REQUEST


class Stopped(JobError):
    """The job stopped before the end; the same command goes on from the last checkpoint."""

    exit_code = EXIT_STOPPED


class DivergedError(JobError):
    """The loss is not finite any more: going on cannot help."""

    exit_code = EXIT_DEFECT


class InconsistentError(JobError):
    """The replicas do not hold the same weights any more: what they train is no longer one model."""

    exit_code = EXIT_DEFECT

"""The ways a job ends before it is finished, and the exit code of each.

Code raises one of these where it understands what went wrong; `cli.run` alone turns them into exit codes.
"""

import errno

EXIT_FINISHED = 0
EXIT_DEFECT = 1
EXIT_REQUEST = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start me again and I go on.


# What a disk or a file server says that is ill: nothing is wrong with the request, and another machine may well meet it.
_FAULTS = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN)


def is_fault(error: BaseException | None) -> bool:
    """Whether the storage has failed, rather than that it has not what was asked for."""
    return isinstance(error, OSError) and error.errno in _FAULTS


class JobError(Exception):
    """A known end of a job. The message is one line that says what is wrong and how to mend it."""

    _exit_code = EXIT_DEFECT

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return self._exit_code


class RequestError(JobError):
    """The request cannot be met: a flag, the configuration, data, storage or the cluster description."""

    _exit_code = EXIT_REQUEST

    @property
    def exit_code(self) -> int:
        """That the request is wrong, unless it is the storage that has failed: schedulers start the job again then."""
        return EXIT_STOPPED if is_fault(self.__cause__) else self._exit_code


class Stopped(JobError):
    """The job stopped before the end; the same command goes on from the last checkpoint."""

    _exit_code = EXIT_STOPPED


class DivergedError(JobError):
    """The loss is not finite any more: going on cannot help."""

    _exit_code = EXIT_DEFECT


class InconsistentError(JobError):
    """The replicas do not hold the same weights any more: what they train is no longer one model."""

    _exit_code = EXIT_DEFECT

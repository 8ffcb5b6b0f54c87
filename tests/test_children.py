"""Processes that work for a command."""

import os
import signal

from trainer import children


def test_signal_to_the_group_does_not_end_what_works_for_the_job() -> None:
    with children.pool(1, os.getpid) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGTERM)
        assert pool.submit(os.getpid).result() == pid

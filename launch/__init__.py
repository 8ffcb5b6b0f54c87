"""Starts the job somewhere: on this machine or under a scheduler. Knows the trainer's flags, files and exit codes only."""

import trainer  # noqa: F401  Ctrl-C while a program loads

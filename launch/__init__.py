"""Starts the job somewhere: on this machine or under a scheduler. Knows the trainer's flags, files and exit codes only."""

"""digitfleet's training job: one result on any number of devices."""

__version__ = "0.1.0"

"""Measurements. They import the trainer; nothing imports them."""

from trainer.cluster import hide_gpus, set_tensorflow_defaults

# On CPUs, all of them: each peer would take a GPU in a way of its own, and workers that are pinned to cores the same one.
hide_gpus()

# As every command does, also for peers that use TensorFlow: each is measured at its best.
set_tensorflow_defaults(-1)

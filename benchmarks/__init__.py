"""Measurements. They import the trainer; nothing imports them."""

from trainer.cluster import set_tensorflow_defaults

# As every command does, also for peers that use TensorFlow: each is measured at its best.
set_tensorflow_defaults(-1)

"""Measurements. They import the trainer; nothing imports them."""

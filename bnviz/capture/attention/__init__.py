"""Attention, however it is computed: found, seen, shown."""

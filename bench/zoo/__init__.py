"""Tiny models of every kind there is, with random weights and inputs they take."""

"""Blocks and their residual writers: found by structure, verified by arithmetic."""

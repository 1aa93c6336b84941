"""Routers of mixtures of experts: found by contract, shown as they dispatched."""

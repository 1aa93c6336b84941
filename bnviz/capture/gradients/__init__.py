"""Gradients: of parameters as backward passes add them, of what blocks give, and what an optimizer makes of them."""

"""Proof of numerics: a bundle and its engines against the eager float32 reference."""

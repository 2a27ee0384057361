"""Speed and bytes, each beside its reference in the same run."""

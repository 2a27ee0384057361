"""Inputs of strangers: files, numbers and tokenizers, read within bounds.

Imports errors, and the library `tokenizers` in one file.
"""

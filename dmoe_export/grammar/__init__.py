"""What an answer must match: regular expressions as automata over the tokens of a vocabulary, and which tokens may stand
at a place of a canvas of given, masked and decided places.
Imports guards/ and errors alone: no tokenizer, no settings, no row.
"""

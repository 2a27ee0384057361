"""What an answer must match: regular expressions as automata over tokens, and the places of a canvas that obey them.

Imports errors and what to install alone: no tokenizer, no settings, no row.
"""

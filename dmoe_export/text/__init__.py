"""Text to token ids and back: tokenizer, chat templates, and who wrote which character of a prompt. No backend.

Imports bundle/ and errors only.
"""

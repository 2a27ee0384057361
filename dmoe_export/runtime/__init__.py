"""Opening a bundle to run it: the backend protocol, its implementations, the key/value cache, text. No torch."""

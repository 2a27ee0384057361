"""Running a bundle: the backend protocol, the host's key/value cache, and which backend is taken. No torch.

Its own files lie below its folders, but choose.py, which is above them; residency/ is below cpu/ and gpu/.
"""

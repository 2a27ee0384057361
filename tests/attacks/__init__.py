"""Every hostile input that the program once took wrongly; README.md says where the test of each is."""

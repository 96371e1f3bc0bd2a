"""The packed file of a network: what is in it (header, streams, integers), writing, reading it."""

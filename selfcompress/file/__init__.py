"""The packed file of a network: what is in it (header), its integers, writing it, reading it."""

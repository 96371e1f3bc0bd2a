"""The packed file of a network: its format (header, streams, integers), writing and reading."""

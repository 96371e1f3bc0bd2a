"""Replacements for torch's layers: they quantise their weights and can have channels removed."""

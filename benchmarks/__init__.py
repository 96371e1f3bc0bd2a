"""Measurements over many models; not part of the package."""

"""Hosts of this library, one in a file."""

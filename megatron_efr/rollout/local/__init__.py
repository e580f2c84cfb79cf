"""The embedded engine: a decoder of our own in this process."""

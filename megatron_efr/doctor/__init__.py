"""Finds out what this machine has and lacks for a run, and says what to do about it."""

"""A run on the GPUs of several machines: which rank and which engine is where, and what each
machine starts.
"""

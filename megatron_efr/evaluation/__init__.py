"""Held-out problems asked, graded and measured: what an evaluation is, what it keeps, and how two
are compared.
"""

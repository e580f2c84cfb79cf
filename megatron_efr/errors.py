"""Errors that rooms share: the one that a person is meant to read, and those of engines. No import
comes with them.
"""

from __future__ import annotations


class UserError(Exception):
    """Something a person can put right. The message says what is wrong, where, and what would be
    right.
    """


class EngineError(RuntimeError):
    """An engine refused, failed or did not answer; the message names the server and what it
    answered.
    """


class LostError(EngineError):
    """An engine did not answer: the connection failed or the limit ran out; or it has failed, by
    its own account.
    """


class NoEngineError(EngineError):
    """No engine is left that serves; once weights are published to those that come back, it can be
    asked again.
    """


class WeightMismatchError(EngineError):
    """An engine does not hold the weights that it was sent. Sending them again would not help: the
    run must stop.
    """

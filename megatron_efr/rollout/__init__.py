"""Rollouts: engines that answer prompts, and the ledger that keeps what they answered."""

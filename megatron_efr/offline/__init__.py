"""Training on responses that are there: rows and pairs, and the loop that `efr sft` and `efr dpo`
share.
"""

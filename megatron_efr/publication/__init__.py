"""Tensors on the move: shards made whole, bucket by bucket, brought to the engines, and checked
there.
"""

"""Reward models behind HTTP and a Redis stream."""

"""The batch queue: a pure batcher, Redis Streams, and the worker between them."""

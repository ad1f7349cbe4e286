"""The other serving frameworks, each in an environment of its own, and the work that all are given."""

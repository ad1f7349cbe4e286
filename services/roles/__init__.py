"""The two roles of a reward service, each a process; a worker imports nothing of HTTP."""

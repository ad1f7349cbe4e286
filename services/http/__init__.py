"""The HTTP face of a reward: uploads, bodies, problems, metrics and their description."""

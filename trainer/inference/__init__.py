"""A trained policy put to use: found by its name, loaded, and drawn from."""

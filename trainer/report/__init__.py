"""One page about training runs: settings, curves, tables, pictures and ablations in a single HTML file."""

"""The paper's experiments in miniature, from the weights that come with the project to docs/results.md and a report.

stages.py says which commands make up the programme; numbers.py reads what they wrote; claims.py holds the numbers to
the paper's claims; plots.py and document.py write them down.
"""

"""Many runs that differ in a setting and a seed, from one file: `python -m trainer.sweep NAME`.

plan.py reads the file and makes the runs of it; found.py looks at what their folders hold; jobs.py starts and watches
the processes; display.py shows them; table.py sums up; session.py puts these together.
"""

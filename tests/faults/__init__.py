"""What can go wrong with weights: a faulty hub, hostile files, killed processes, full disks.

The modules hold what is injected as data, and a `run` that injects it; pytest and the script
`python -m tests.faults` share them.
"""

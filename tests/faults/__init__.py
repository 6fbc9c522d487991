"""What can go wrong with weights and with training, and what is left when it does.

Weights: a faulty hub, hostile files, full disks. Training: killed processes, signals, values that
are not finite, broken images, misuse. The modules hold what is injected as data, and a `run` that
injects it, or a `CASES` of functions that inject one thing each; pytest and the script
`python -m tests.faults` share them.
"""

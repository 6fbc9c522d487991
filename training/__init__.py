"""Training and validation: what `train.py` and `validate.py` are made of.

`commands` holds the two programs, `trainer` the run, `engine` one step of it. Every settings group
lies next to what it sets, e.g. `OptimConfig` in `optim`; `config` merges them.
"""

"""Measures fumehood beside its peers, on one machine in one run: `make bench`, that is `python -m bench`.

`--quick` for a short run, `--only NAME` (repeatable) for some of it, `--force` on a machine that is busy with other work.
"""

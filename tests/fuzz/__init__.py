"""Random calls, most of them damaged, of every raw op and every public op: none may end the process.

`python -m tests.fuzz raw --minutes 10 --seed 3`, or `public`; docs in CONTRIBUTING.md.
"""

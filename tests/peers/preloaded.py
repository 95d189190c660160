"""What the workers of several tests compare with, imported once in the process that they are forked from."""

from benchmarks import peers

if peers.why_not("open_clip") is None:
    peers.load("open_clip")

"""Other tools on the same model, calibration text and evaluation: each in an environment of its own.

A peer is one module here. It runs as `python -m benchmarks.peers.NAME JOB` inside its own virtual environment, reads
a `Job`, and gives back the weights its stored form decodes to, and how many bytes that form takes.
`measure.measure_peers` makes the environments and the jobs, and measures what comes back.
"""

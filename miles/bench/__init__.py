"""`miles bench`: how fast the parts of miles are here, as numbers that can be compared with other days and machines.

`measure` holds what a benchmark and its results are, `rounds` runs them, `record` writes and reads results, `compare`
says what changed. The benchmarks themselves stand in `table`.
"""

"""What an index will take before it is built: memory, disk, time of every stage, cost of a query.

`rehearsal` runs the very steps of a build over a small made-up dataset, `calibration` turns what it took into
`constants` of this machine, and `estimate` scales them to the size that is asked for; `wording` says it to
people. Nothing here is needed to build or to serve: what an index takes and finds stands in its release.
"""

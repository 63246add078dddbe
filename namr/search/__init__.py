"""Search in an open release: candidates from the index, ordered by the adaptive distance.

`answers` has the options of a search and what it answers, for Python, HTTP and the client alike; `searcher`
opens a release and searches it; `rerank` orders candidates and `certainty` says how sure that order is;
`items` says what an id is.
"""

"""Search in an open release: candidates from the index, ordered by the adaptive distance.

`answers` has the options of a search and what it answers, for Python, HTTP and the client alike; `searcher`
searches a release that `opening` opened, stage by stage (`stages`): `first_stage` finds candidates, `rerank`
orders them and `certainty` says how sure that order is; `items` says what an id is, `filters` which may be
found.
"""

"""An index and all that it is served with, built in parts and published as one immutable thing.

`build` turns the embeddings of a dataset version into a segment and its re-rank vectors by Ray tasks
(`build_steps`, `vector_steps`); `held_out` decides by id which images only query an index, and `places` finds
a vector by its id. `releases` stores and opens what was built (`arrays` as files), `publication` says by one
pointer which release is current, and `takedowns` keeps what none may show. `garbage` and `old_embeddings`
delete what no release needs any more, by the leave of `users` and in the order of `doomed`.
"""

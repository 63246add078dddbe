"""An index and all that it is served with, built in parts and published as one immutable thing.

`build` turns the embeddings of a dataset version into a segment and its re-rank vectors by Ray tasks
(`build_steps`); `releases` stores, verifies, publishes and rolls back; `held_out` decides by id which images
only query an index. One pointer says which release is current.
"""

"""An index and all that it is served with, built in parts and published as one immutable thing.

`build` turns all embeddings of a dataset version into a template (`templates`) and a segment with its vectors
and items (`segments`, by `build_steps` and `vector_steps`), `increment` adds a segment of what is new;
`held_out` decides by id which images only query an index, and `places` finds a vector by its id. `releases`
stores and opens what was built (`arrays` as files, `export` as one), `publication` says by one pointer which
release is current, and `takedowns` keeps what none may show. `garbage` and `old_embeddings` delete what no
release needs any more, by the leave of `users` and in the order of `doomed`. `erasing` erases images wherever
they are, and `erasures` keeps the receipts.
"""

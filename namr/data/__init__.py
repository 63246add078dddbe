"""Images in shards, listed in versions of a dataset, and read back in every order that is needed.

`packing` brings a source's images into new shards (`pack_shard` writes one) and publishes a dataset version;
`images` is the one way from bytes to pixels; `sampling` draws P x K batches as a function of (seed, step),
which `reading` fetches and `loading` makes ready for training. A dataset is changed only by publishing its
next version; `erasing` empties shards, which `records` remembers.
"""

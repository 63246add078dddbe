"""Embeddings: what one model made of one shard, stored once and found again by both digests.

`extraction` embeds the shards that are missing, as Ray actors: `decoding` feeds the model, `shard_table`
takes what it makes, `throughput` says which was slow. `embeddings` stores a file for each pair of model and
shard, and the set that covers a dataset version. What is missing is the set of pairs not there. `erasing`
leaves nothing of erased images in them.
"""

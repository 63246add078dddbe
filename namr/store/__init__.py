"""Objects and small files that are written once, wherever they lie: a local folder or an S3 bucket.

`storage` is the one interface of both kinds, with the two conditional writes that everything else is built
on; `manifests` describe what was written and point to what is current; `tables`, `ranges` and `cache` read
it: as columns, in pieces, and from local disk. Nothing here knows what an image or an index is.
"""

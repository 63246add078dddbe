"""The last step of a night: collect what no release needs any more, without spoiling the night.

What failed here is told, and the night is good all the same: what it published serves, nothing that is kept
was touched, and the next collection takes what this one left. Not covered: what is collected (`garbage`,
`old_embeddings`).
"""

from namr.errors import NamrError
from namr.release import garbage, old_embeddings
from namr.release.garbage import CollectionConfig
from namr.store.lease import Lease


def collect(
    releases_uri: str, config: CollectionConfig, *, held: Lease, work_uri: str | None, embeddings_uri: str
) -> str:
    """What was freed, or why nothing was, in words. held: the night's own lease."""
    try:
        done = garbage.collect(releases_uri, config, held=held, work_uri=work_uri)
        more = old_embeddings.collect(embeddings_uri, releases_uri, config, held=held)
        return done.with_more(more).in_words
    except NamrError as error:
        return f"the collection failed and is due again: {type(error).__name__}: {error}"

"""The night: from a champion model and a dataset to the next release, or to a reason why not.

`reindexing` extracts what is missing; `building` builds as little as makes the next release, `measuring` says
how good it is (`assessment`, against `truth`) and whether its template has aged (`aging`), `gate` holds it
against what serves, `release_report` and `description` tell, and `collection` deletes what no release needs
any more. It is safe to repeat, to kill anywhere and to run twice at once.
"""

"""The night: from a champion model and a dataset to the next release, or to a reason why not.

`reindexing` extracts what is missing, builds, measures (`assessment`, against `truth`), reports
(`release_report`), holds the result against what serves (`gate`), publishes, and collects what no release
needs any more (`collection`). It is safe to repeat, to kill anywhere and to run twice at once.
"""

"""Runs and model versions, kept by MLflow.

`registry` talks to MLflow and `tracking` says where it is; `pyfunc` is the model as MLflow loads it for
others; `references` turns what a user names ("models:/namr@champion", a folder) into a model at hand, and
`fetched` lets processes that share a folder fetch it once.
"""

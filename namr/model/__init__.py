"""The method as arithmetic: a backbone, twin heads, the adaptive distance and the joint loss.

`distances` is the one definition of plain and structure-weighted distance for losses, metrics and search;
`losses` adds multi-cluster ranking to a base loss; `model` puts backbone and heads together and saves them
as one folder. No cluster, no storage and no MLflow is known here.
"""

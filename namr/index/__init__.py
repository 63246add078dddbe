"""FAISS indexes as arrays and files: chosen, trained, filled in parts, merged and searched.

`planning` says which index suits N vectors; `ivf` trains a template, builds parts from it, merges them into
one segment equal to the index that one machine would have built, and searches segments; `index_files` knows
the keys on offer and how they lie on disk. No storage, no dataset and no model is known here.
"""

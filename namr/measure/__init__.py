"""What an embedding is worth: metrics on arrays, models compared on a dataset, reports of both.

`metrics` defines Recall@K, MAP@R and the others; `validation` names the ways of searching and chooses one;
`evaluation` compares models on images with labels; `report` draws tables, curves and pictures as HTML.
"""

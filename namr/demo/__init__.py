"""All stages in a row on one machine, on real images.

`demo` runs them and shows the outcome; `recipes` says what it packs and how it trains for each kind of
images.
"""

"""`bitdance data download RECIPE`: the kept rows' pictures, fetched by img2dataset.

recipe.py     what to fetch and how
run.py        prepares the rows, runs the tool, sums up its statistics
guard.py      what the tool runs inside: which requests may leave, and what may come back
"""

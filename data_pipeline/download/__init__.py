"""`bitdance data download RECIPE`: the kept rows' pictures, fetched by img2dataset.

recipe.py     what to fetch and how
run.py        prepares the rows, has the tool run, sums up its statistics
shards.py     which of its shards are complete
tool.py       the tool in its own environment, tied to this process
guard.py      what the tool runs inside: which requests may leave, and what may come back
"""

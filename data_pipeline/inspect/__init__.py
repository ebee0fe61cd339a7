"""`bitdance data inspect DATASET`: what a dataset holds, as one HTML page that needs nothing beside it.

look.py    reads the dataset: side index, a spread of records, the filter's funnel
bars.py    histograms and the funnel as SVG
page.py    decodes the shown pictures and lays out the page
"""

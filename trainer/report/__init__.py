"""`bitdance report RUN`: a run as one HTML page that needs nothing beside it.

run_data.py  what the run folder tells
chart.py     curves as SVG
pictures.py  samples as a grid of embedded pictures
page.py      the page
"""

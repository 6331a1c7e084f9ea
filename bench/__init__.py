"""Side-by-side measurement of ploopd and its peers; `python -m bench --help`."""

"""Reports of one run or several: figures, tables and a verdict on one page."""

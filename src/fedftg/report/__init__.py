"""Tables and plots of runs: reads run folders and nothing else. See docs/design.md.

`load` reads a folder, `table` makes tables for the terminal and for Markdown, `plots` makes PNG files. The modules are
imported one by one, so that a table does not wait for matplotlib.
"""

"""How a search is asked: the HTTP interface, the results page and the command line. Never imports torch or ray."""

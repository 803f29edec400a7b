"""How the service bears many clients at once, and what it adds to a search."""

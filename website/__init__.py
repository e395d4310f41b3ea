"""What `make docs` makes of the code: keys, commands and pictures; links that lead somewhere."""

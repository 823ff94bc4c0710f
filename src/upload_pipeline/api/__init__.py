"""The HTTP service: routes that ask intake, the database's functions and search, and do no work of their own."""

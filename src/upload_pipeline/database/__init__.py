"""The database: pools, migrations, the embedded server, and one typed function for each SQL verb."""

"""Finding chunks: the query's vector and the one SQL function that ranks."""

"""Teacher traces in, training rows out."""

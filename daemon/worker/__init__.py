"""One run, from its claim to its outcome. The only room that calls providers."""

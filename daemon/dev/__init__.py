"""`image-jobs dev`: everything on this machine. Nothing outside this package imports it, and the daemon runs without it."""

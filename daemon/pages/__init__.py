"""Pages that this machine's browser opens, and how their files are served. `dev/canvas/` has the other page."""

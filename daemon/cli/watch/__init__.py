"""The command `watch`: follows a workflow's nodes over Supabase Realtime, as a canvas does.

watch    the command: connects, reconnects, prints
channel  REST and Realtime, as a client of the project uses them
nodes    the client's copy of the nodes, merged by version
"""

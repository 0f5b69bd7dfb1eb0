"""The command `doctor`: checks everything the daemon needs, and names a cure for what is missing.

doctor     the command: runs the checks, prints their findings
database   version, notifications, migrations, connections, plugins
schema     what is in the way of image runs, one that is tried and undone, old daemons
set_up     buckets, policies, the publication
keys       which kind the project's keys are
storage    the buckets
providers  which daemon serves them, and whether they accept the keys
webhooks   a signed test delivery through the project's own address
finding    the result of one check
"""

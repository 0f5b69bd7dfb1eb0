"""All talk with Postgres: notify, claim, settle. Knows no provider and no storage.

1. `listener.py` receives notifications ("look again", "these claims are lost") and sets `signals.py`.
2. `dispatcher.py` waits for signals and makes one round trip at a time, `image_jobs.sync`. By it
3. finished runs are settled and progress is recorded: the entries that `outbox.py` collected,
4. free slots are filled: each claimed run goes to the worker, and is held until it is settled,
5. claims that turned out to be lost are dropped by the worker.
6. `heartbeat.py` beats meanwhile, renews the `lease.py`, and takes over the runs of silent daemons.
7. A daemon that was taken for dead (`DaemonFenced`) gets a new id: `identity.py`.
8. Of a provider that this daemon cannot reach it claims nothing for a while: `unreachable.py`.
9. `obstacles.py` reports that every second, and lets the database tell who waits why.
10. `client.py` has one method per SQL function, and calls it over `connections.py`; all it writes goes through `plain.py` or
    `sanitize.py`, by the rule of `base64_rule.py`.
"""

"""Store images in Supabase Storage.

* `client.py`: `Storage`, one bucket: upload, download, find, public URL, with time limits.
* `tries.py`: how often a request is tried, and with which pauses.
* `objects.py`: an object as Storage describes it, and a file that is read for as long as the lease lasts.
* `addresses.py`: which object of ours a URL names, if it names one.
* `keys.py`: the keys of a run's objects; all are below its workflow's id.
* `errors.py`: Storage's errors as `RunError`, with codes `storage_…`.

Fencing: `upload` asks `may_write` before each try, so that a daemon whose claim is stale does not overwrite a newer image.
Dedup: keys follow from workflow and run, so a repeated upload replaces the object and never makes a second one.
User-supplied URLs are not for this room: see `daemon/fetch`.
"""

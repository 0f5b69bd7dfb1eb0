"""Fetch user-supplied URLs: nothing is allow-listed (SSRF). Our own storage goes through `Storage`.

A user-supplied URL (a previous image, a webhook address, a result that a provider points to) is a request that an outsider
makes from this machine. The guard, from the outside in:

* `client.py`: `Fetcher` downloads an image; each redirect is checked anew, size and time are limited.
* `destinations.py`: `Destinations` checks scheme, port and name, and all addresses of the name (DNS rebinding).
* `addresses.py`: the addresses that are public.
"""

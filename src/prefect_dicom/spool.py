"""The spool: where arriving objects lie between the PACS and the archive.

::

    incoming/<random>.part          being written
    ready/<study>/<sha256>.dcm      whole, attributed to a study (its reference)
    quarantine/<sha256>.dcm, .json  whole, and nobody asked for it (or it is another's)

A file's name is the SHA-256 taken as its bytes arrived, so a file proves itself: after a crash
it counts only if its bytes still have the hash it is called by, otherwise it is deleted and
asked for again. The spool is a cache of the PACS; nothing here needs fsync (a power loss makes
files fail their hash), while ledger and archive are durable.
"""

from __future__ import annotations

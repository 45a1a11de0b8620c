"""Followers: external stores that are kept up to date from the journal and caught up after an outage.

`follower.py` is the loop that ships, which knows no store; each other file is the adapter of one store and the only
one that imports its driver.
"""

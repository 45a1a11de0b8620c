"""Starts the whole product on one machine: `python -m launcher`, which is what `make run` does.

It knows which processes there are and where they listen, and nothing of what they do: it imports only ``runtime``.
"""

"""What the follower of a Prometheus-compatible store and its reader share: names of series, and the way to ask it.

`labels.py` maps a metric's identity to labels and back, `client.py` asks the first of several addresses that answers.
"""

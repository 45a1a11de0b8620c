"""The history: the service that decides whether a point is acknowledged.

``engine`` holds the data and knows no transport; this package is its process: settings, the gRPC servicer, status.
"""

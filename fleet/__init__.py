"""The domain's shared words: what a metric, a server, a row and a health rule are, and the one way rows are written.

Every service and the gateway speak these words; none of them is known to ``runtime`` below. Nothing here may import a
service.
"""

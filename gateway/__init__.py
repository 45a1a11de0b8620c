"""The front door: gRPC and HTTP/JSON for clients in any language, on top of the services behind it.

It owns no store. It keeps a copy of the live state by subscription (``gateway.state``), so that a read is a look-up
and the cache may be away; everything else is asked of the service that owns it. gRPC and HTTP run the same servicer
methods through the same interception.
"""

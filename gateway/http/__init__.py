"""HTTP/JSON for the public gRPC services, driven by their descriptors: no route is written here a second time.

app = create_app([bind("openmanager.gateway.v1.FleetService", servicer), ...], interception=..., guard=..., ...)
await serve_http(app, "127.0.0.1:8080", process.stopping)

server      the ASGI server in the running event loop, address errors, orderly end
  generations  one of it for each certificate that the files have held   (certificate: tried before it is used)
  app       operator pages (/healthz, /readyz, /metrics, /openapi.json, /docs), everything else to the bridge
    guard   who may come in
    bridge  one request: route, body, call through runtime.interception, answer or stream
      routes     google.api.http annotations -> the table of routes
      transcode  path, query and body -> request message   (values: one value; decode: JSON bodies)
      encode     response message -> proto3 JSON
      streams    streamed responses as JSON lines or Server-Sent Events
      replies    errors and headers on the wire
  openapi   the same routes as OpenAPI 3.1, comments from the protos
"""

"""Who is let in at the front door, and to what.

    callers    who calls, by what he shows: gRPC here, HTTP in gateway.http.guard
    table      the tokens that are known, as metadata tells them
    policy     what each role may call, as the protos say beside each RPC

What must stay true: a method that says nothing of roles is refused to everybody, and one that does not say that it
honours scopes to everybody who has one; gRPC and HTTP ask the same table and the same policy.
"""

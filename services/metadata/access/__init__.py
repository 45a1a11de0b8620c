"""Who may do what: users, tokens, and what gateways are told of them.

    AccessService        people's calls, forwarded by a gateway that has found the caller to be an administrator
    AccessFeedService    everything that a gateway needs to know a caller, sent again whenever it changed

Users and tokens are in PostgreSQL only: changing them needs it. What gateways are told is kept on our own disk too, so
that nobody is locked out while it is away.

What must stay true: no secret is stored, only what one can be compared with; a secret is told once, to who made it; a
change is told to every gateway within 5 s, whichever metadata process made it.
"""

"""How a request that granian has received reaches the application: what is in memory is answered there and then.

granian makes a coroutine and a task of each request, which begins in the loop's next turn. An answer from memory needs
none of it: without, an empty application takes 27 instead of 30 us of processor a request.

What must stay true: what cannot be answered at once is called as granian calls it, in a task that granian knows of;
what fails is told to granian, which logs it and answers with 500.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from granian._granian import CallbackScheduler

from gateway.http.replies import Event, Receive, Scope, Send

Application = Callable[[Scope, Receive, Send], Any]
AtOnce = Callable[[Scope], tuple[Event, Event] | None]


class Dispatch(CallbackScheduler):
    """Told of each request by a thread of granian's, has the loop answer it."""

    def __new__(cls, loop: asyncio.AbstractEventLoop, *_: Any) -> "Dispatch":
        """What granian would call by itself, and how it would enter a task, it is not asked for."""
        return super().__new__(cls, loop, None, None, None, None)  # type: ignore[call-arg]  # stubs

    def __init__(self, loop: asyncio.AbstractEventLoop, app: Application, at_once: AtOnce) -> None:
        """`at_once`: the two ASGI events of an answer from memory; None: `app` is to be called."""
        super().__init__()
        context = self._ctx

        def answer(received: Any) -> None:
            try:
                quick = at_once(received.scope)
                if quick is None:
                    received.taskref(loop.create_task(_call(app, received)))
                    return
                send = received.proto.send
                send(quick[0])  # it has done its work when it returns; what it returns need not be waited for
                send(quick[1])
            except BaseException as error:
                received.err(error)
            else:
                received.done()

        def schedule(received: Any) -> None:  # must return None: granian does not free what it is given
            loop.call_soon_threadsafe(answer, received, context=context)

        self._schedule_fn = schedule


async def _call(app: Application, received: Any) -> None:
    scope, proto = received.scope, received.proto
    scope.update(root_path="", state={})  # as granian's own way does
    try:
        await app(scope, proto.receive, proto.send)
    except BaseException as error:
        received.err(error)
        return
    received.done()

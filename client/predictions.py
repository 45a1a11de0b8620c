"""Which servers are about to fail, and why."""

from client.api import PAGE_SIZE, OpenManager
from client.outlook import SERVICE
from openmanager.gateway.v1 import analytics_pb2 as pb


async def predictions(
    manager: OpenManager, *, min_probability: float = 0.0, environment: str = "", role: str = ""
) -> pb.ListPredictionsResponse:
    """The servers that are at least so likely to fail within hours, likeliest first, all pages of them.

    Args:
        manager: the gateway.
        min_probability: 0 to 1; 0: all servers.
        environment, role: only servers of these; empty: all.
    """
    request = pb.ListPredictionsRequest(
        page_size=PAGE_SIZE, min_probability=min_probability, environment=environment, role=role
    )
    whole: pb.ListPredictionsResponse | None = None
    while True:
        raw = await manager.call(f"{SERVICE}/ListPredictions", request.SerializeToString())
        page = pb.ListPredictionsResponse.FromString(raw)
        request.page_token = page.next_page_token
        if whole is None:
            whole = page
        else:
            whole.predictions.extend(page.predictions)
        if not request.page_token:
            whole.next_page_token = ""
            return whole

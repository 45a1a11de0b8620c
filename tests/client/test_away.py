"""A gateway that goes away while it is used, and comes back."""

import asyncio
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from client import Metric, OpenManager, OpenManagerError, batch
from tests.client.calling import OnTerminal, called, running
from tests.harness import eventually
from tests.harness.product import Product


async def test_watching_goes_on_and_writing_loses_nothing(tmp_path: Path) -> None:
    async with Product(tmp_path, SIMULATOR_INTERVAL="1s", SIMULATOR_SERVERS="3") as product:
        await product.start("metadata", "timeseries", "cache", "simulator", "gateway")
        address = product.addresses["gateway"]
        with OnTerminal(address, "watch") as terminal:
            await asyncio.to_thread(terminal.until, lambda shown: "3 servers" in shown)
            async with (
                running(address, "watch") as watch,
                running(address, "ingest", "-", stdin=subprocess.PIPE) as ingest,
            ):
                await eventually(lambda: watch.out.count("\n") >= 4, within_s=30)
                feed = ingest.process.stdin
                assert feed is not None
                start = int(time.time()) - 60
                feed.write(line(start, metrics=True) + line(start + 1))
                await feed.drain()
                await eventually(lambda: kept(address) == 2, within_s=30)

                await product.kill("gateway", how=signal.SIGKILL)
                await eventually(lambda: "trying again in" in watch.err, within_s=30)
                await asyncio.to_thread(terminal.until, lambda shown: "not live: " in last_frame(shown))
                feed.write(line(start + 2) + line(start + 3))
                await feed.drain()
                await eventually(lambda: "sending again in" in ingest.err, within_s=30)
                before = watch.out.count("\n")
                await product.start("gateway")
                await eventually(lambda: watch.out.count("\n") >= before + 6, within_s=60)
                assert f"{address} is back" in watch.err
                await asyncio.to_thread(
                    terminal.until,
                    lambda shown: "servers: " in last_frame(shown) and "not live" not in last_frame(shown),
                )
                feed.write(line(start + 4))
                feed.close()
                assert await asyncio.wait_for(ingest.process.wait(), 60) == 0, ingest.err
                await eventually(lambda: ingest.out == "accepted 5 points, rejected 0\n")
                assert kept(address) == 5

                watch.process.send_signal(signal.SIGINT)
                assert await asyncio.wait_for(watch.process.wait(), 30) == 130
                assert "Traceback" not in watch.err
            terminal.interrupt()
            assert await asyncio.to_thread(terminal.ended) == 130


def line(moment: int, *, metrics: bool = False) -> bytes:
    body = {"rows": [{"serverId": "client-away", "time": moment}], "values": [moment]}
    return json.dumps(body | ({"metrics": [{"name": "m"}]} if metrics else {})).encode() + b"\n"


def kept(address: str) -> int:
    done = called(address, "history", "client-away", "m", "--step", "0", "--output", "csv")
    return max(done.stdout.count("\n") - 1, 0)


def last_frame(shown: str) -> str:
    """What the terminal shows: what was drawn last in full."""
    frames = shown.split("\x1b[H")
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frames[-2] if len(frames) > 1 else "")


@pytest.mark.full
async def test_what_waiting_does_not_mend_is_raised(tmp_path: Path) -> None:
    async with Product(tmp_path, GATEWAY_TOKEN="a-token-of-the-tests") as product:
        await product.start("cache", "gateway")
        address = product.addresses["gateway"]

        def asked(*words: str, token: str | None = None, stdin: str = "") -> tuple[int, str]:
            environ = {} if token is None else {"OPENMANAGER_TOKEN": token}
            done = called(address, *words, environ=environ, stdin=stdin)
            return done.returncode, done.stderr

        for words in (("servers",), ("watch",), ("status",), ("ingest", "-")):
            status, told = await asyncio.to_thread(asked, *words, stdin='{"rows": []}')
            assert (status, "TOKEN_REQUIRED" in told, "OPENMANAGER_TOKEN" in told) == (5, True, True), words
        # it may be a token that metadata knows, which is away
        status, told = await asyncio.to_thread(asked, "servers", token="not-the-token")
        assert (status, "ACCESS_UNKNOWN" in told) == (6, True)
        assert await asyncio.to_thread(asked, "servers", token="a-token-of-the-tests") == (0, "")
        assert (await asyncio.to_thread(asked, "servers", "--token", "a-token-of-the-tests")) == (0, "")
        # the stores' owners are away: their stores are down, and what is written is not taken
        status, told = await asyncio.to_thread(asked, "status", token="a-token-of-the-tests")
        assert (status, told) == (1, "")
        body = json.dumps({"metrics": [{"name": "m"}], "rows": [{"serverId": "a", "time": "now"}], "values": [1]})
        words = ("ingest", "-", "--retry-for", "1s")
        status, told = await asyncio.to_thread(asked, *words, token="a-token-of-the-tests", stdin=body)
        assert status == 6 and "timeseries" in told, told

        async with OpenManager.connect(address, token="a-token-of-the-tests") as manager:
            with pytest.raises(OpenManagerError) as refused:
                await manager.write(batch([Metric(name="m")], [("a", time.time())], [[1.0]]), retry_for_s=0.5)
            assert refused.value.is_transient and refused.value.from_gateway
            with pytest.raises(OpenManagerError, match="there is no server 'a'") as missing:
                await manager.server("a")
            assert (missing.value.reason, missing.value.field) == ("SERVER_NOT_FOUND", "id")

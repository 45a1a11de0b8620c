"""How often somebody may try to log in: for each account and for each address, so many wrong tries, then few.

A try is paid for before the password is looked at, so that many at once gain nothing, and paid back when it was right.
Who is refused is told the same whether the account exists or not.

What must stay true: memory is bounded, and filling it lets nobody try more often; only a try that was made is
remembered, so that who has none left cannot fill it; an account whose owner is kept out by a stranger's tries opens
again by itself, in the time that one try takes to come back.
"""

import ipaddress
from collections import OrderedDict
from typing import Final

from runtime.clock import Clock
from runtime.errors import ResourceExhausted

OF_ACCOUNT: Final = 10
OF_ADDRESS: Final = 30
"""So many wrong tries in a row; people behind one address are several."""
ACCOUNT_REFILL_S: Final = 60.0
ADDRESS_REFILL_S: Final = 20.0
"""In this time one try comes back: a guesser has 1,440 a day at one account."""
MAX_KEPT: Final = 100_000
"""Accounts and addresses with wrong tries that are remembered, 200 bytes each. Beyond, nobody new may try: forgetting
the oldest would let who has many addresses buy tries with them."""


class Attempts:
    """Counts the wrong tries of this process; a restart forgets them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # who -> tries left, as of when

    def spend(self, account: str, address: str) -> None:
        """Pays for a try; raises ResourceExhausted, LOGIN_RATE_LIMITED, when there is none left.

        `account`: its name as the database compares names, or who spells it otherwise has more tries.
        """
        paid: list[tuple[str, int]] = []
        for who, most, refill_s in self._payers(account, address):
            if (wait_s := self._take(who, most, refill_s)) > 0:
                for other in paid:
                    self._give(*other)
                raise ResourceExhausted(
                    "there were too many wrong tries to log in; wait, then try again",
                    reason="LOGIN_RATE_LIMITED",
                    retry_after_s=wait_s,
                )
            paid.append((who, most))

    def right(self, account: str, address: str) -> None:
        """The password was right: the try cost nothing, and the account's owner has all of his again."""
        (of_account, *_), (of_address, most, _) = self._payers(account, address)
        self._left.pop(of_account, None)
        self._give(of_address, most)

    def give_back(self, account: str, address: str) -> None:
        """The password was not looked at: the try cost nothing."""
        for who, most, _ in self._payers(account, address):
            self._give(who, most)

    @staticmethod
    def _payers(account: str, address: str) -> tuple[tuple[str, int, float], tuple[str, int, float]]:
        return (
            (f"account {account}", OF_ACCOUNT, ACCOUNT_REFILL_S),
            (f"address {_network(address)}", OF_ADDRESS, ADDRESS_REFILL_S),
        )

    def _take(self, who: str, most: int, refill_s: float) -> float:
        """0, or in how many seconds there is one to take."""
        now_s = self._clock.monotonic()
        if who not in self._left:
            self._forget(now_s)
            if len(self._left) >= MAX_KEPT:
                return refill_s
        left, at_s = self._left.get(who, (float(most), now_s))
        left = min(float(most), left + (now_s - at_s) / refill_s)
        if left < 1:
            return (1 - left) * refill_s
        self._left[who] = (left - 1, now_s)
        self._left.move_to_end(who)
        return 0.0

    def _give(self, who: str, most: int) -> None:
        left, at_s = self._left.get(who, (float(most), 0.0))
        if left + 1 < most:
            self._left[who] = (left + 1, at_s)
        else:  # he has all of his again
            self._left.pop(who, None)

    def _forget(self, now_s: float) -> None:
        """Drops those who have all their tries again, the oldest first."""
        longest_s = max(OF_ACCOUNT * ACCOUNT_REFILL_S, OF_ADDRESS * ADDRESS_REFILL_S)
        while self._left and now_s - next(iter(self._left.values()))[1] >= longest_s:
            self._left.popitem(last=False)


def _network(address: str) -> str:
    """An IPv6 address by its /64, which is what one household has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found)

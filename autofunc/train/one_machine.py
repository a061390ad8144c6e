"""Where the agents of a launch meet, when there is one: it waits for nobody.

torch's own, "c10d", sleeps for up to 0.3 s first, lest many machines come at once, and asks a server who else has come
whenever the workers are looked at.
"""

from __future__ import annotations

import os

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class OneMachine(RendezvousHandler):
    """Gives the agent and its workers a store on this machine, the same at each start.

    Args:
        host: address of this machine.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._store: TCPStore | None = None
        self._rounds = 0

    def get_backend(self) -> str:
        """What it is called."""
        return "one machine"

    @property
    def use_agent_store(self) -> bool:
        """Whether workers are clients of the agent's store, or else the first of them makes one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, and this agent's rank among all agents."""
        self._rounds += 1
        if self._store is None:
            self._store = TCPStore(self._host, 0, is_master=True)
        agents = PrefixStore(f"agents {self._rounds}", self._store)
        return RendezvousInfo(agents, 0, 1, RendezvousStoreInfo(self._host, self._store.port))

    def is_closed(self) -> bool:
        """Whether agents may not meet again."""
        return False

    def set_closed(self) -> None:
        """Others would be told: there are none."""

    def num_nodes_waiting(self) -> int:
        """How many agents wait to be let in."""
        return 0

    def get_run_id(self) -> str:
        """Differs from that of other launches."""
        return f"autofunc-{os.getpid()}"

    def shutdown(self) -> bool:
        """Let go of the store; whether that worked."""
        self._store = None
        return True

"""A rendezvous for a single agent, which waits for nobody.

torch's own, "c10d", first sleeps for up to 0.3 s to spread out arrivals, and asks a server for other agents whenever
workers are polled.
"""

from __future__ import annotations

import os

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class OneMachine(RendezvousHandler):
    """Gives the agent and its workers one store on this machine, which restarts reuse.

    Args:
        host: address of this machine.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._store: TCPStore | None = None
        self._rounds = 0

    def get_backend(self) -> str:
        """Return the handler's name."""
        return "one machine"

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the agent's store, instead of the first worker starting one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, and the agent's rank among all agents."""
        self._rounds += 1
        if self._store is None:
            self._store = TCPStore(self._host, 0, is_master=True)
        agents = PrefixStore(f"agents {self._rounds}", self._store)
        return RendezvousInfo(agents, 0, 1, RendezvousStoreInfo(self._host, self._store.port))

    def is_closed(self) -> bool:
        """Return whether the rendezvous is closed."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there are no other agents to tell."""

    def num_nodes_waiting(self) -> int:
        """Return the number of waiting agents."""
        return 0

    def get_run_id(self) -> str:
        """Return an id that differs between launches."""
        return f"autofunc-{os.getpid()}"

    def shutdown(self) -> bool:
        """Release the store; return whether that worked."""
        self._store = None
        return True

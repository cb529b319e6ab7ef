"""What is under way over HTTP and gRPC together: bounds on requests, and on the bytes they hold.

Pure. Bodies of HTTP count as they come, messages of gRPC once they are there (``messages`` bounds
how many are on their way), answers until they are sent. Health checks are not counted.
"""

from __future__ import annotations

from types import TracebackType

from paddle_ft.serve.types import Unavailable

RETRY_AFTER_S = 1.0


class Budget:
    """Of one replica."""

    def __init__(self, requests_max: int = 512, bytes_max: int = 2**30) -> None:
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self.requests = 0
        self.nbytes = 0

    def messages(self, nbytes: int) -> int:
        """How many of ``nbytes`` fit into it; one at least."""
        return max(1, self._bytes_max // nbytes)

    def request(self) -> Charge:
        """One more; raises Unavailable (503) if there are too many."""
        if self.requests >= self._requests_max:
            raise Unavailable(
                f"{self.requests} requests are under way here already: try again later",
                RETRY_AFTER_S,
            )
        self.requests += 1
        return Charge(self)


class Charge:
    """What one request holds; given back when it is closed."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._nbytes = 0
        self._open = True

    def add(self, nbytes: int) -> None:
        """``nbytes`` more. Raises Unavailable (503) beyond the bound; a request that is alone may
        be of any size, which other bounds hold."""
        budget = self._budget
        others = budget.nbytes - self._nbytes
        if others and budget.nbytes + nbytes > budget._bytes_max:
            raise Unavailable(
                f"requests and answers under way here hold {budget.nbytes} bytes already: "
                "try again later",
                RETRY_AFTER_S,
            )
        self._nbytes += nbytes
        budget.nbytes += nbytes

    def close(self) -> None:
        if self._open:
            self._open = False
            self._budget.requests -= 1
            self._budget.nbytes -= self._nbytes

    def __enter__(self) -> Charge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""Who runs next: first come first served within a priority, prompts in pieces between the others' tokens.

A step spends at most `step_tokens` tokens: one for each running request, the rest on prompts. Memory is not counted
beforehand, since how much eviction leaves is known only when a text has been read. Instead a step that does not fit is
refused by the page memory with nothing changed, and the request that came last makes room: one that is still reading
its prompt begins again later, a running one moves to host memory, where its few kept tokens are small.
"""

from dataclasses import dataclass, field

from octavo.engine.request import Request


@dataclass
class Plan:
    """What one step does."""

    prefill: list[list[tuple[Request, int]]] = field(default_factory=list)  # how many tokens each reads, see `together`
    decode: bool = False  # whether the running batch takes a step


class Scheduler:
    """The requests that are not done. `max_batch`: how many may run at once; `padding`: see `together`."""

    def __init__(self, max_batch: int, step_tokens: int, padding: float = 0.0) -> None:
        self.max_batch, self.step_tokens, self.padding = max_batch, step_tokens, padding
        self.waiting: list[Request] = []
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self._full = False  # whether memory had no room; until some is given back nobody is admitted

    @property
    def unfinished(self) -> int:
        """Requests that are not done."""
        return len(self.waiting) + len(self.prefilling) + len(self.running)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def plan(self) -> Plan:
        """Choose who takes part in the next step."""
        left = self.step_tokens - len(self.running)
        while self.waiting and not self._full and self._places() >= 1 + self.waiting[0].siblings:
            self.prefilling.append(self.waiting.pop(0))
        self.prefilling.sort(key=lambda r: r.order)
        reads: list[tuple[Request, int]] = []
        for request in self.prefilling:
            # At least one token, so that a prompt gets on however many others run.
            count = min(len(request.tokens) - request.read, max(left, 0 if reads else 1))
            if count > 0:
                reads.append((request, count))
                left -= count
        return Plan(together(reads, self.padding), decode=bool(self.running))

    def _places(self) -> int:
        return self.max_batch - len(self.running) - sum(1 + r.siblings for r in self.prefilling)

    def ran(self, request: Request) -> None:
        """A request has read its prompt and joined the running batch."""
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.running.append(request)

    def ended(self, request: Request) -> None:
        """A request is done, wherever it was."""
        for each in (self.waiting, self.prefilling, self.running):
            if request in each:
                each.remove(request)
        self._full = False

    def holding(self) -> list[Request]:
        """Requests that hold memory."""
        return [r for r in self.prefilling if r.cache is not None and r.read] + self.running

    def victim(self, wanting: Request | None) -> Request | None:
        """Who makes room where memory has none: who came last, but not `wanting` where another came later.

        None: nobody else holds anything, so what was wanted can never fit.
        """
        others = [r for r in self.holding() if r is not wanting]
        if not others:
            return None
        last = max(others, key=lambda r: r.order)
        if wanting is not None and wanting.order > last.order:
            return wanting
        return last

    def back(self, request: Request) -> None:
        """A request has made room and waits again; nobody is admitted until memory is given back."""
        self.ended(request)
        self.add(request)
        self._full = bool(self.running or self.prefilling)


def together(reads: list[tuple[Request, int]], padding: float) -> list[list[tuple[Request, int]]]:
    """What is read in one forward each: whole prompts of about one length, which are padded to the longest, and others
    alone. A forward of several has at most `padding` times as many columns as they have tokens; 0: none has several.

    A forward comes when the first of its requests is due: what short memory makes room for is what came last.
    """
    whole = sorted((read for read in reads if read[0].unread and read[1] == len(read[0].tokens)), key=lambda r: -r[1])
    groups: list[list[tuple[Request, int]]] = []
    for read in whole:
        last = groups[-1] if groups else []
        if last and last[0][1] * (len(last) + 1) <= padding * (sum(count for _, count in last) + read[1]):
            last.append(read)
        else:
            groups.append([read])
    groups += [[read] for read in reads if read not in whole]
    return sorted(groups, key=lambda group: min(request.order for request, _ in group))

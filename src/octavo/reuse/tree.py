"""A radix tree over token ids: which records have slots for a prompt, and how far each of them agrees with it."""

from collections.abc import Iterator

import numpy as np

from octavo.reuse.record import Record, Tokens


def common(a: Tokens, b: Tokens) -> int:
    """How many tokens two prompts begin with in common."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


class Node:
    """Tokens `start` up to, not including, `end` of all prompts that go through here.

    `records` are those that hold slots of these tokens, and end here or below.
    """

    __slots__ = ("children", "edge", "end", "parent", "records", "start")

    def __init__(self, start: int, edge: Tokens, parent: "Node | None") -> None:
        self.start, self.end, self.edge, self.parent = start, start + len(edge), edge, parent
        self.children: dict[int, Node] = {}
        self.records: set[Record] = set()


class Tree:
    """The records of one namespace."""

    def __init__(self) -> None:
        self.root = Node(0, np.zeros(0, np.int32), None)

    def add(self, record: Record) -> None:
        """Take a record in."""
        tokens, node = record.entry.tokens, self.root
        while node.end < len(tokens):
            child = node.children.get(int(tokens[node.end]))
            if child is None:
                child = Node(node.end, tokens[node.end :], node)
                node.children[int(tokens[node.end])] = child
            else:
                shared = common(child.edge, tokens[node.end :])
                if shared < len(child.edge):
                    child = self._split(child, shared)
            node = child
        while node.end > record.entry.first and node.parent is not None:
            node.records.add(record)
            node = node.parent

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node after some of its tokens; returns the upper part."""
        assert node.parent is not None
        upper = Node(node.start, node.edge[:at], node.parent)
        upper.records = {record for record in node.records if record.entry.first < upper.end}
        node.parent.children[int(node.edge[0])] = upper
        node.start, node.edge, node.parent = upper.end, node.edge[at:], upper
        upper.children[int(node.edge[0])] = node
        return upper

    def remove(self, record: Record) -> None:
        """Forget a record, and nodes that nobody needs any more."""
        path = [node for node, _ in self._path(record.entry.tokens)]
        for node in reversed(path):
            node.records.discard(record)
            if not node.children and not node.records and node.parent is not None:
                del node.parent.children[int(node.edge[0])]
            elif node.records:
                self._join(node)

    def _join(self, node: Node) -> None:
        """Undo a split that was made for a record that is gone, and let the edge, which may be a part of that record's
        tokens, be one of tokens that stay."""
        if len(node.children) == 1:
            (child,) = node.children.values()
            if child.records == node.records:
                node.end, node.children = child.end, child.children
                for each in node.children.values():
                    each.parent = node
        node.edge = next(iter(node.records)).entry.tokens[node.start : node.end]

    def walk(self, tokens: Tokens) -> tuple[int, dict[Record, int]]:
        """(tokens that some record agrees with, how many of a prompt's first tokens each record agrees with)."""
        matched, agreed = 0, {}
        for node, shared in self._path(tokens):
            matched = node.start + shared
            for record in node.records:
                agreed[record] = matched
        return matched, agreed

    def _path(self, tokens: Tokens) -> Iterator[tuple[Node, int]]:
        """Nodes below the root that agree with a prompt, each with how many of its tokens do."""
        node = self.root
        while node.end < len(tokens):
            child = node.children.get(int(tokens[node.end]))
            if child is None:
                return
            shared = common(child.edge, tokens[node.end :])
            yield child, shared
            if shared < len(child.edge):
                return
            node = child

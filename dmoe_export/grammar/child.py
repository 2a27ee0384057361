"""Run by `automaton.py` as a process of its own, with limits: a regular expression on standard input → its automaton.

Imports neither this package nor numpy, so that it starts in some 30 ms.
"""

import sys

del sys.path[0]  # this folder

import json  # noqa: E402
from array import array  # noqa: E402
from typing import Any  # noqa: E402


def main(most_states: int, memory: int, seconds: int, end: str) -> None:
    """Print a line of JSON: `error`, `states`, or `start`, `accepting` and how many numbers follow, (state, byte, next)
    each. The automaton is of the expression with the letter `end` behind it.

    The library also makes the automaton that looks for a match anywhere, which may have exponentially more states: of
    `"(a|\\\\"){0,100}"` too many for any memory. An empty match, of less priority, ends that search at once.
    """
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    except ImportError:  # not on this system; whoever runs it still looks at the clock
        pass
    from outlines_core import Index, Vocabulary

    vocabulary: Any = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    regex = sys.stdin.buffer.read().decode("utf-8")
    try:
        Index(f"|{regex}", vocabulary)  # as it is, and nothing behind the empty match: `a)(b` in brackets would be one
        index: Any = Index(f"(?:\x00\x01(?:{regex}){end}|)", vocabulary)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        return
    edges = index.get_transitions()
    edges.pop(index.get_initial_state(), None)
    # The edge behind the empty match is left out: what it leads to is the state that no edge leads to.
    reached = {after for row in edges.values() for after in row.values()}
    first = [state for state, row in edges.items() if state not in reached and list(row) == [1]]
    if len(first) > 1:
        print(json.dumps({"error": f"it holds {end!r}, which ends every text here"}))
        return
    start = edges.pop(first[0])[1]
    if len(edges) > most_states:
        print(json.dumps({"states": len(edges)}))
        return
    numbers = array("i")
    for state, row in edges.items():
        for byte, after in row.items():
            if byte < 256:  # that is the end of a match
                numbers.extend((state, byte, after))
    head = {"start": start, "accepting": list(index.get_final_states()), "numbers": len(numbers)}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + numbers.tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

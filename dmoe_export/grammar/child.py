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
        try:
            Index(regex, vocabulary)
        except ValueError as error:
            if "Failed to build DFA" in str(error):  # as it is: `a)(b` with brackets around it is one
                raise
        index: Any = Index(f"(?:{regex}){end}", vocabulary)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        return
    edges = index.get_transitions()
    if len(edges) > most_states:
        print(json.dumps({"states": len(edges)}))
        return
    numbers = array("i")
    for state, row in edges.items():
        for byte, after in row.items():
            if byte < 256:  # that is the end of a match
                numbers.extend((state, byte, after))
    head = {"start": index.get_initial_state(), "accepting": list(index.get_final_states()), "numbers": len(numbers)}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + numbers.tobytes())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])

"""Replicas of a bundle under load, simulated: the real batch and its rules on a clock that only counts.

What is real: `JoiningBatch` with its turns, caches and acceptance, and the server's `Queue`. What is not: the forward,
which takes the seconds of a model of measured or predicted steps (steps.py), the network, and text.
"""

ASSUMPTIONS = (
    "Replicas do not slow each other down: each has a machine or GPU of its own.",
    "A step of the batch takes seconds that are linear in rows, padded tokens, tokens, vocabulary rows, distinct "
    "experts and attended places; what a fit leaves over (residual_median) is not drawn.",
    "Predicted steps: one row takes what is predicted; further experts cost what the experts op is predicted to cost "
    "more from 15 to 70 active ones, beyond 70 in proportion; further tokens cost their operations at --tflops; "
    "reading the cache costs nothing.",
    "A block's experts are an independent draw: of E experts, b blocks of k activate E·(1 − (1 − k/E)^b).",
    "A block takes the number of steps its request has drawn; all answers reach their full length.",
    "Encoding text, the network and the server's own threads take no time; a client that has its answer asks again at "
    "once, which is after the next step has begun.",
    "Measured steps have in them what the batch does on the host around a forward; predicted ones do not.",
    "No prompts begin alike, no request is cancelled, replicas do not fail or start.",
)

"""How much memory a bundle takes to run, before it is opened: what fits, and what does not.

Prediction by parts (`predict`), what a process may use here (`room`), the largest batch and context or the expert
budget that fits (`largest`), refusing what cannot (`refuse`). Nothing here opens a bundle, a library or a device.
"""

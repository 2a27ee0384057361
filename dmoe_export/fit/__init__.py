"""How much memory a bundle takes to run, before it is opened: what fits, and what does not."""

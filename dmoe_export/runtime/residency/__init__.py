"""Which experts stay on the fast tier: the policy, the budget, and a backend under them. Knows no hardware.

Imports runtime's own files only; what fast and slow are, is a `Tier` of cpu/ or gpu/.
"""

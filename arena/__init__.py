"""The arena: a simulated platform, its attackers and labellers, and what drives the real loop over them.

Nothing below this floor imports it. The simulator's truth lives here and never enters the store.
"""

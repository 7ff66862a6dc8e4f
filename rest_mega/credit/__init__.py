"""ResT: which region each sampled token belongs to, what its gradient weighs, and the advantages of
a group."""

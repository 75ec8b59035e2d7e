"""The benchmark protocol: ours and others' engines, same weights, same loads, same run.

Every engine runs in a process of its own (``peers``), asked over a pipe (``sides``) for one job
after another (``workloads``) in turns (``compare``). The parent knows figures only. Nothing here is
imported by the product, and nothing here knows Django.
"""

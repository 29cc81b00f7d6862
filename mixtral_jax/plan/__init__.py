"""What a run will need of a pod, before a chip is rented: memory, FLOPs, traffic and time. The program is `__main__.py`."""

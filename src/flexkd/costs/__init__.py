"""What a run will cost and whether it fits, from configs alone: parameters, memory, operations, time."""

"""Flags that are no field of the schema: Megatron-LM's others, from 23.06 to Core 0.19, and those of other frameworks."""

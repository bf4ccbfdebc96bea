"""Tables of flags that set no field: Megatron-LM's others, from 23.06 to Core 0.19, and those of other frameworks."""

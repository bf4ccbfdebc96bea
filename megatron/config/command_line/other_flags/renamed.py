"""Table of the flags of Megatron-LM that flags of other names replace here. Each row has a flag, then its replacement.

VALUE stands for the value of the replaced flag. A flag whose row has no VALUE takes none.
"""

RENAMED = """
--batch-size                             --micro-batch-size VALUE
--warmup                                 --lr-warmup-fraction VALUE
--model-parallel-size                    --tensor-model-parallel-size VALUE
--checkpoint-activations                 --recompute-granularity full --recompute-method uniform
--checkpoint-num-layers                  --recompute-num-layers VALUE
--activations-checkpoint-method          --recompute-granularity full --recompute-method VALUE
--activations-checkpoint-num-layers      --recompute-num-layers VALUE
--distribute-checkpointed-activations    --distribute-saved-activations
--persistent-save-interval               --save-interval VALUE
--save-retain-interval                   --keep-every VALUE --keep-last 1
"""

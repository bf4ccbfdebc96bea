"""Table of Megatron-LM's old flags, and of those that are two of ours: one row a flag, then the flags that replace it.

VALUE is the word after the old flag; a flag without it takes none.
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

"""Table of the flags of Megatron-LM that are refused, grouped by the unavailable feature that they belong to.

`table.py` explains the notation. When a feature is added, its flags move from here to fields of the schema.
"""

# Feature, which ends the error "`--flag` belongs to ...", -> flags.
FEATURES = {
    # models
    "mixtures of experts, which are not available yet": """
        --num-experts --expert-model-parallel-size=1 --moe-* --overlap-moe-expert-parallel-comm
        --expert-tensor-parallel-num-weight-shards --ep-overlap-early-attn-memory-release --use-grouped-gemm-for-shared-expert
        --overlap-dispatch-backward-with-experts-wgrad --save-tokens-per-expert-interval""",
    "multi-token prediction, which is not available yet": "--mtp-num-layers=0 --mtp-*",
    "multi-head latent attention, which is not available yet": """
        --multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
        --cache-mla-latents --mla-down-proj-fusion --mscale --mscale-all-dim""",
    "normalised queries and keys, which are not available yet": """
        --qk-layernorm --qk-l2-norm --apply-wd-to-qk-layernorm --no-weight-decay-cond-type --qk-clip --qk-clip-alpha
        --qk-clip-threshold""",
    "scaled rotary positions, which are not available yet": """
        --use-rope-scaling --rope-scaling-factor --rotary-scaling-factor=1|1.0 --rope-type=rope
        --rotary-seq-len-interpolation-factor=1 --yarn-* --no-yarn-correction-range-round-to-int --no-rope-freq
        --mrope-section""",
    "relative positions, which are not available": "--relative-attention-*",
    "other kinds of attention, which are not available": """
        --window-size --window-attn-skip-freq --softmax-type=vanilla --attention-output-gate
        --experimental-attention-variant --linear-* --dsa-* --no-dsa-* --disable-dsa-*""",
    "biases of the query, key and value projections alone, which are not available yet": "--add-qkv-bias",
    "other activations, which are not available": """
        --quick-geglu --glu-linear-offset=0|0.0 --activation-func-clamp-value""",
    "hybrid models (Mamba), which are not available": """
        --hybrid-attention-ratio --hybrid-mlp-ratio --hybrid-override-pattern --hybrid-layer-pattern --is-hybrid-model
        --mamba-* --disable-mamba-mem-eff-path""",
    "models whose layers differ, which are not available": "--heterogeneous-layers-*",
    "maximal update parametrisation, which is not available": "--use-mup --mup-*",
    "encoder-decoder models, which are not available": """
        --decoder-num-layers --decoder-seq-length --pipeline-model-parallel-split-rank --encoder-tensor-model-parallel-size
        --encoder-pipeline-model-parallel-size""",
    "retrieval with BERT, which is not available": "--bert-load --output-bert-embeddings --bert-embedder-type",
    "retrieval models (ICT, biencoder), which are not available": """
        --ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load --titles-data-path
        --query-in-block-prob --use-one-sent-docs --evidence-data-path --retriever-report-topk-accuracies
        --retriever-score-scaling --retriever-seq-length --sample-rate --block-data-path --embedding-path
        --indexer-batch-size --indexer-log-interval""",
    "Retro, which is not available": "--retro-*",
    "vision models, which are not available": """
        --img-dim --img-h --img-w --num-classes --num-channels --patch-dim --classes-fraction --data-per-class-fraction
        --head-lr-mult --vision-* --swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-*""",
    # numbers
    "FP8 and FP4, which are not available yet; use --bf16": """
        --fp8-* --no-fp8-wgrad --disable-fp8-wgrad --fp4-* --first-last-layers-bf16 --num-layers-at-start-in-bf16
        --num-layers-at-end-in-bf16 --keep-fp8-transpose-cache --keep-fp8-transpose-cache-when-using-custom-fsdp
        --reuse-grad-buf-for-mxfp8-param-ag --te-precision-config-file --kitchen-* --use-kitchen-attention
        --no-stream-ckpt-dequant --disable-stream-ckpt-dequant""",
    "accumulation in another precision, which is not available; use --grad-reduce-in-bf16": """
        --ddp-reduce-scatter-with-fp32-accumulation --ddp-param-name-patterns-for-fp32-local-accumulation
        --disable-bf16-reduced-precision-matmul --batch-invariant-mode""",
    # the optimizer
    "other optimizers, which are not available; --optimizer is adam or sgd": "--muon-* --lion-*",
    "a separate initialization of embeddings, which is not available": "--embedding-init-method-std",
    "frozen layers, which are not available": "--freeze-all-layers",
    # layout and memory
    "fully sharded data parallelism, which is not available; --use-distributed-optimizer shards the optimizer state": """
        --use-torch-fsdp2 --use-megatron-fsdp --use-custom-fsdp --data-parallel-sharding-strategy=no_shard
        --outer-dp-sharding-strategy=no_shard --megatron-fsdp-* --fsdp-* --enable-full-sharding-in-hsdp
        --suggested-communication-unit-size --torch-fsdp2-no-reshard-after-forward --no-strict-fsdp-dtensor-load
        --disable-strict-fsdp-dtensor-load --tensor-parallel-num-weight-shards""",
    "sequences of different lengths on context-parallel ranks, which are not available": """
        --hybrid-context-parallel --max-seqlen-per-dp-cp-rank""",
    "optimizer state or activations in host memory, which is not available; --use-distributed-optimizer and "
    "--recompute-granularity save memory": """
        --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
        --use-torch-optimizer-for-cpu-offload --cpu-offloading-num-layers=0 --cpu-offloading-*
        --fine-grained-activation-offloading --fine-grained-offloading-* --offload-modules --activation-offload-fraction
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks --min-offloaded-tensor-size""",
    # data
    "TikTokenizer, which is not available; HuggingFaceTokenizer reads a tokenizer.json": """
        --tiktoken-* --tokenizer-special-tokens""",
    "tokenizer settings that are read from the tokenizer's own files here": """
        --tokenizer-metadata --tokenizer-sentencepiece-legacy --null-tokenizer-eod-id --null-tokenizer-pad-id""",
    "models that come with code, which is never executed": "--trust-remote-code",
    "other paddings of the vocabulary, which are not available; use --make-vocab-size-divisible-by": """
        --padded-vocab-size --no-pad-vocab-size --disable-pad-vocab-size""",
    "attention within documents by their lengths, which is not available; use --reset-attention-mask": """
        --dataloader-inter-document-masking""",
    "fill-in-the-middle training, which is not available": "--fim-*",
    "object storage, which is not available; data and checkpoints are files": """
        --s3-cache-path --object-storage-cache-path --enable-msc""",
    # other ways to train
    "training on chats (SFT), which is not available yet": "--sft --sft-*",
    "reinforcement learning, which is not available": "--perform-rl-step --rl-* --grpo-* --langrl-* --refit-method",
    "knowledge distillation, which is not available": "--logits-* --export-kd-* --export-te-mcore-model",
    "other kinds of evaluation, which are not available; use --eval-iters, --eval-interval and --valid-data-path": """
        --full-validation --multiple-validation-sets --validation-set-names --start-eval-at-iter --eval-global-batch-size
        --eval-micro-batch-size""",
    "runs in phases, which are not available": "--phase-transition-iterations --override-ckpt-iteration",
    # checkpoints
    "checkpoints on the nodes' own disks, which are not available; --async-save saves without waiting": """
        --non-persistent-* --replication --replication-factor --replication-jump""",
    "conversion of checkpoints; use tools/import_megatron.py and tools/export_megatron.py": "--ckpt-convert-*",
    "taking the layout from the checkpoint, which is not available; any layout loads any checkpoint, so set it by flags": """
        --use-mp-args-from-checkpoint-args""",
    # profiling, debugging and fault tolerance
    "profiling by nsys or torch, which is not available; --profile-pipeline measures the pipeline": """
        --profile --use-pytorch-profiler --record-memory-history --run-workload-inspector-server""",
    "dumps of tensors, which are not available": """
        --save-activations-interval --save-dgrads-interval --save-wgrads-interval --save-params-interval
        --dump-param-to-param-group-map""",
    "checks that are not available; use --on-nonfinite": """
        --check-for-spiky-loss --check-for-large-grads --gpu-sniff-test-interval""",
    "fault injection, which is not available": "--error-injection-* --fault-injector-* --fake-process-group",
    "NVIDIA's resiliency extension, which is not used: a rank that dies or hangs ends the job with one error, and "
    "--auto-resume continues it": """
        --enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters --inprocess-*""",
    # programs
    "Megatron-LM's programs that generate text; use tools/generate.py": """
        --prompts --prompt-file --prompt-file-num-truncate --num-tokens-to-generate --temperature --top_k --top_p
        --return-log-probs --output-path --output-every-n-results --incoming-requests-per-sec --incoming-requests-per-step
        --termination-id""",
}

# End of the error "`--flag` ...", for flags that do not belong to a feature, -> flags.
OTHER_MESSAGES = {
    "is not available yet; leave it out: the residual stream has the type of the weights": """
        --fp32-residual-connection --embedding-weights-in-fp32""",
    "is not available; --recompute-granularity selective recomputes core_attn, and full recomputes whole layers": """
        --recompute-modules=core_attn""",
    "is not available: one seed gives the same weights on every data-parallel rank": "--data-parallel-random-init",
    "needs a private library; use --auto-resume": "--adlr-autoresume --adlr-autoresume-interval",
    "is now --pipeline-stage-layers 0 N N ..., the layers of each stage from the first to the last": """
        --standalone-embedding-stage""",
    "is not available: settings come from a TOML file, --config FILE": "--yaml-cfg",
}

# Values that only Megatron-LM's flag accepts: flag -> value -> end of the error "`--flag value` ...".
REFUSED_VALUES = {
    "--tokenizer-type": {
        "TikTokenizer": "is not available; HuggingFaceTokenizer reads a tokenizer.json",
        "Llama2Tokenizer": "is not available; GPTSentencePieceTokenizer reads its tokenizer.model, HuggingFaceTokenizer its "
        "tokenizer.json",
        "MultimodalTokenizer": "belongs to vision models, which are not available",
        "NullMultimodalTokenizer": "belongs to vision models, which are not available",
        "SFTTokenizer": "belongs to training on chats (SFT), which is not available yet",
    },
    "--position-embedding-type": {
        "relative": "is not available: positions are learned_absolute, rope or none",
        "mrope": "belongs to vision models, which are not available",
        "yarn": "belongs to scaled rotary positions, which are not available yet",
    },
    "--optimizer": dict.fromkeys(
        ("muon", "dist_muon", "adaptive_muon", "dist_adaptive_muon", "lion", "soap"), "is not available; legal: adam, sgd"
    ),
    "--dataloader-type": {"external": "is not available: samples come from indexed datasets; legal: single, cyclic"},
}

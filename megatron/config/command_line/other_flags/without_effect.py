"""Table of the flags of Megatron-LM that are accepted without effect, grouped by reason. `table.py` explains the notation.

These flags choose an implementation, or concern something that pretraining does not do. Ignoring a flag that would change the
loss, the checkpoints or the memory of a run would mislead the user, so such a flag is usually refused, in `refused.py`.
Exceptions are the flags of random numbers, checkpoint formats, CUDA graphs, the allocator and communication buffers, in which a
run differs from one of Megatron-LM in any case.
"""

# Maps each reason, the end of the note "`--flag` changes nothing: ...", to its flags.
WITHOUT_EFFECT = {
    # the layers
    "there is one implementation of the layers": """
        --transformer-impl=local|transformer_engine --spec=local --use-mcore-models --use-legacy-models""",
    "attention is torch's scaled_dot_product_attention, which picks a flash kernel where it can": """
        --use-flash-attn --attention-backend=flash|fused|unfused|local|auto --flash-attention-version=2|3|4
        --no-masked-softmax-fusion""",
    "attention masks are always built where they are used": "--no-create-attention-mask-in-dataloader",
    "attention scores are never scaled by the layer's number, which would cancel out": "--no-query-key-layer-scaling",
    "the scaling cancels out, and only guards against an overflow that cannot happen here": "--apply-query-key-layer-scaling",
    "the softmax always accumulates in fp32": "--attention-softmax-in-fp32",
    "fusion is left to torch; --compile turns it on": """
        --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --disable-jit-fuser
        --use-flashinfer-fused-rope --use-te-activation-func --use-transformer-engine-op-fuser --fused-residual-rmsnorm
        --use-fused-weighted-squared-relu --use-grouped-gemm-for-dense-mlp""",
    "LayerNorm has one implementation": "--no-persist-layer-norm",
    "the loss is computed in fp32, in chunks of a few tokens, which takes no more memory": """
        --fp16-lm-cross-entropy --cross-entropy-loss-fusion --cross-entropy-fusion-impl=native|te""",
    "export to ONNX is not supported": "--onnx-safe=?",
    "steps run without CUDA graphs, with the same results": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-impl=none|local|transformer_engine|full_iteration
        --cuda-graph-scope=* --cuda-graph-modules=* --cuda-graph-warmup-steps=? --optimizer-cuda-graph""",
    "optimizer state and main weights are fp32, and so are reduced gradients without --grad-reduce-in-bf16": """
        --use-precision-aware-optimizer --main-grads-dtype=fp32 --main-params-dtype=fp32 --exp-avg-dtype=fp32
        --exp-avg-sq-dtype=fp32""",
    "weights are always initialized, then replaced by those of --load": "--no-initialization",
    "initial weights are the same on every device and layout": "--use-cpu-initialization --init-model-with-meta-device",
    "--seed alone determines initial weights, order of samples and dropout masks; the kernels are torch's": """
        --deterministic-mode --te-rng-tracker --use-te-rng-tracker --inference-rng-tracker""",
    # parallel layout and communication
    "ranks come from the launcher's environment variables": "--local_rank=?",
    "process groups are always created at the start": "--lazy-mpu-init=*",
    "there is one data-parallel implementation": "--DDP-impl=local|torch",
    "gradients are always stored in contiguous buffers": "--no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp",
    "how gradients and weights are split into buckets never changes a result; --ddp-bucket-size sets the size": """
        --ddp-num-buckets=? --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective --delay-param-gather
        --no-delay-grad-reduce --no-align-grad-reduce --disable-align-grad-reduce --no-align-param-gather
        --no-gradient-reduce-div-fusion --overlap-param-gather-with-optimizer-step --no-use-layer-wise-param-layout""",
    "--use-distributed-optimizer shards over all data-parallel ranks, with the same result": """
        --num-distributed-optimizer-instances=?""",
    "ranks are always ordered tensor, context, data, pipeline, and the order changes no result": "--use-tp-pp-dp-mapping",
    "context parallelism is always ring attention, with the same result": """
        --cp-comm-type=* --hierarchical-context-parallel-sizes=*""",
    "it concerns mixtures of experts alone": "--expert-tensor-parallel-size=?",
    "the overlap never changes a result": """
        --no-async-tensor-model-parallel-allreduce --tp-comm-overlap --tp-comm-overlap-cfg=? --tp-comm-overlap-rs-dgrad
        --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs
        --disable-tp-comm-split-ag --disable-tp-comm-split-rs --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad
        --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag --no-tp-comm-split-rs
        --tp-comm-bootstrap-backend=nccl|mpi|gloo""",
    "how activations are sent between pipeline stages never changes a result": "--no-scatter-gather-tensors-in-pipeline",
    "transfers between stages have one implementation": "--use-ring-exchange-p2p",
    "transfers between stages always overlap with computation": """
        --overlap-p2p-communication --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush""",
    "--pipeline-schedule sets the order of computations in the pipeline, which changes no result": """
        --microbatch-group-size-per-virtual-pipeline-stage=? --defer-embedding-wgrad-compute --wgrad-deferral-limit=?
        --delay-wgrad-compute""",
    "communication is configured by torch.distributed and by NCCL's environment variables": """
        --nccl-communicator-config-path=? --use-nccl-ub --use-sharp --sharp-enabled-group=dp|dp_replica
        --high-priority-stream-groups=* --high-priority-a2a-comm-stream --create-all-gather-group
        --disable-gloo-process-groups --enable-gloo-process-groups --disable-symmetric-registration
        --pipeline-model-parallel-comm-backend=nccl|ucc --symmetric-ar-type=two_shot|one_shot|multimem_all_reduce
        --flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*""",
    "--distributed-timeout-minutes applies during the whole run": "--distributed-timeout-seconds-after-init=?",
    # memory and time of a step
    "memory is left to torch's allocator": """
        --empty-unused-memory-level=? --no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding""",
    "garbage collection is left to Python": """
        --manual-gc --manual-gc-interval=? --no-manual-gc-eval --disable-manual-gc-eval""",
    "the host waits for its device at every log line": "--train-sync-interval=?",
    "the optimizer state is never offloaded to host memory": "--no-pin-cpu-grads --no-pin-cpu-params",
    "an MLP always takes the whole sequence at once": "--mlp-chunks-for-training=1",
    # the data
    "datasets are always memory-mapped": "--data-impl=mmap|infer",
    "datasets are always memory-mapped, with the same result": "--no-mmap-bin-files --dataloader-defer-npy-index-mmap",
    "the operating system reads ahead": "--mmap-warmup",
    "sample indices are built once, and stored in --data-cache-path": """
        --num-dataset-builder-threads=? --dataloader-fast-cache-load --per-dataset-sequences-path=?""",
    "each dataset of a blend always gets 0.5% more samples than its weight needs": "--mid-level-dataset-surplus=0.005",
    "all ranks draw from one order of samples": "--no-data-sharding",
    "no token of the data counts as padding": "--allow-ambiguous-pad-tokens",
    "the data of a training run are token ids already": """
        --tokenizer-hf-no-include-special-tokens --no-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces""",
    "each type of tokenizer has one implementation": "--legacy-tokenizer --tokenizer-hf-no-use-fast",
    "a tokenizer on the command line always overrides the checkpoint's": """
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args""",
    "multi-storage clients are never used": "--disable-msc",
    # checkpoints
    "checkpoints have one format, which all ranks write and read in parallel, and any layout loads": """
        --ckpt-format=torch|torch_dist|torch_dcp|zarr|fsdp_dtensor --dist-ckpt-format=torch|torch_dist|torch_dcp|zarr
        --use-dist-ckpt --auto-detect-ckpt-format --ckpt-assume-constant-structure --dist-ckpt-workers=?
        --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load
        --ckpt-fully-parallel-save-process-group=dp|ep_dp --ckpt-fully-parallel-load-process-group=dp|ep_dp
        --ckpt-fully-parallel-load-exchange-algo=broadcast|gather_rounds|gather_object
        --dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-save-pre-mcore-014""",
    "a checkpoint must contain exactly the tensors of the run, and its files are checked against the manifest": """
        --dist-ckpt-strictness=? --verify-integrity --no-ckpt-load-validate-sharding-integrity
        --disable-ckpt-load-validate-sharding-integrity""",
    "--async-save writes from a copy in host memory": """
        --use-persistent-ckpt-worker --async-strategy=nvrx|mcore --async-ckpt-cpu-priority=? --async-ckpt-io-priority=?
        --async-ckpt-use-cpu-shm""",
    "random numbers depend only on the seed and the step, so checkpoints contain no RNG state": "--no-load-rng --no-save-rng",
    "checkpoints always store the main weights, in fp32": "--load-main-params-from-ckpt",
    # stopping, error checks and logging
    "during training, SIGTERM, SIGUSR1 or Ctrl-C to any rank always saves, and ends the run with status 75": """
        --exit-signal-handler --exit-signal=? --exit-signal-handler-for-training --exit-signal-handler-for-dataloader""",
    "gradients are always checked for NaN and Inf; --on-nonfinite sets the reaction": "--no-check-for-nan-in-loss-and-grad",
    "steps are not run twice in search of faulty hardware": """
        --rerun-mode=disabled|validate_results --result-rejected-tracker-filename=?""",
    "the weights of data-parallel replicas are not compared": "--check-weight-hash-across-dp-replicas-interval=?",
    "there are no timers inside a step": """
        --timing-log-level=? --timing-log-option=? --no-barrier-with-level-1-timing --log-timers-to-tensorboard""",
    "throughput is always logged, in TFLOP/s and tokens/s": "--log-throughput",
    "these metrics are not available": """
        --log-progress --log-straggler --disable-straggler-on-startup --straggler-ctrlr-port=? --straggler-minmax-count=?
        --log-energy --log-device-memory-used --log-memory-interval=? --log-max-attention-logit""",
    "the level of log messages is fixed": "--logging-level=?",
    "the configuration is saved with every checkpoint": "--config-logger-dir=?",
    "one_logger is NVIDIA's private tracker": """
        --no-one-logger --one-logger-project=? --one-logger-run-name=? --one-logger-async --app-tag-run-name=?
        --app-tag-run-version=?""",
    "it concerns --profile alone": """
        --profile-step-start=? --profile-step-end=? --profile-ranks=* --pytorch-profiler-* --record-shapes --nvtx-ranges""",
    "it concerns --record-memory-history alone": "--memory-snapshot-path=?",
    "tests are run by `make test`": "--test-mode",
    "no feature depends on it": "--enable-experimental",
    "it concerns inference alone": """
        --inference-* --no-inference-* --flash-decode --enable-chunked-prefill --disable-chunked-prefill
        --decode-only-cuda-graphs --mlp-chunks-for-prefill=? --nccl-all-reduce-for-prefill --num-speculative-tokens=?
        --use-legacy-static-engine
        --use-same-sampling-seed-across-dp-ranks --chat-template=?""",
    "it concerns the text generation server alone": "--max-tokens-to-oom=?",
}

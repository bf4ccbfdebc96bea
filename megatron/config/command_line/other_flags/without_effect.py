"""Table of Megatron-LM's flags that are accepted without effect, by the reason. `table.py` explains the notation.

They choose an implementation, or concern something that pretraining does not do. A flag that would change a loss, a checkpoint
or the memory that a run needs is refused instead, in `refused.py`: to ignore it would mislead.
"""

# The reason, as in the note "`--flag` changes nothing: ...", then the flags.
WITHOUT_EFFECT = {
    # the layers
    "there is one implementation of the layers": """
        --transformer-impl=local|transformer_engine --spec=local --use-mcore-models --use-legacy-models""",
    "attention is torch's scaled_dot_product_attention, which picks a flash kernel where it can": """
        --use-flash-attn --attention-backend=flash|fused|unfused|local|auto --flash-attention-version=2|3|4
        --no-masked-softmax-fusion""",
    "attention masks are made where they are used": "--no-create-attention-mask-in-dataloader",
    "scores are never scaled by the layer's number, which cancels out anyway": "--no-query-key-layer-scaling",
    "it cancels out; scores never overflow here": "--apply-query-key-layer-scaling",
    "the softmax always accumulates in fp32": "--attention-softmax-in-fp32",
    "fusion is left to torch; --compile turns it on": """
        --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --disable-jit-fuser
        --use-flashinfer-fused-rope --use-te-activation-func --use-transformer-engine-op-fuser --fused-residual-rmsnorm
        --use-fused-weighted-squared-relu --use-grouped-gemm-for-dense-mlp""",
    "there is one LayerNorm": "--no-persist-layer-norm",
    "the loss is made in fp32 a few tokens at a time, which takes no more memory": """
        --fp16-lm-cross-entropy --cross-entropy-loss-fusion --cross-entropy-fusion-impl=native|te""",
    "there is no ONNX path": "--onnx-safe=?",
    "steps run without CUDA graphs, with the same results": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-impl=none|local|transformer_engine|full_iteration
        --cuda-graph-scope=* --cuda-graph-modules=* --cuda-graph-warmup-steps=? --optimizer-cuda-graph""",
    "optimizer state, main weights and reduced gradients are fp32 (--grad-reduce-in-bf16 halves the last)": """
        --use-precision-aware-optimizer --main-grads-dtype=fp32 --main-params-dtype=fp32 --exp-avg-dtype=fp32
        --exp-avg-sq-dtype=fp32""",
    "weights are drawn, then replaced by those of --load": "--no-initialization",
    "initial weights are the same on every device and layout": "--use-cpu-initialization --init-model-with-meta-device",
    "initial weights, order of samples and dropout masks follow from --seed alone; the kernels are torch's": """
        --deterministic-mode --te-rng-tracker --use-te-rng-tracker --inference-rng-tracker""",
    # who sends what to whom
    "ranks come from the environment": "--local_rank=?",
    "the mesh is built at once": "--lazy-mpu-init=*",
    "there is one data-parallel implementation": "--DDP-impl=local|torch",
    "gradients always lie in contiguous buffers": "--no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp",
    "in what portions gradients and weights travel never changes a result; --ddp-bucket-size sets their size": """
        --ddp-num-buckets=? --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective --delay-param-gather
        --no-delay-grad-reduce --no-align-grad-reduce --disable-align-grad-reduce --no-align-param-gather
        --no-gradient-reduce-div-fusion --overlap-param-gather-with-optimizer-step --no-use-layer-wise-param-layout""",
    "--use-distributed-optimizer shards over all data-parallel ranks, with the same result": """
        --num-distributed-optimizer-instances=?""",
    "ranks stand in one order (tensor, context, data, pipeline), and no order changes a result": "--use-tp-pp-dp-mapping",
    "keys and values go round a ring of context-parallel ranks, with the same result": """
        --cp-comm-type=* --hierarchical-context-parallel-sizes=*""",
    "it divides experts, and there are none": "--expert-tensor-parallel-size=?",
    "the overlap never changes a result": """
        --no-async-tensor-model-parallel-allreduce --tp-comm-overlap --tp-comm-overlap-cfg=? --tp-comm-overlap-rs-dgrad
        --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs
        --disable-tp-comm-split-ag --disable-tp-comm-split-rs --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad
        --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag --no-tp-comm-split-rs
        --tp-comm-bootstrap-backend=nccl|mpi|gloo""",
    "it never changes a result": "--no-scatter-gather-tensors-in-pipeline",
    "there is one way to send": "--use-ring-exchange-p2p",
    "transfers between stages always overlap with the work": """
        --overlap-p2p-communication --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush""",
    "the order of work in a pipeline is --pipeline-schedule, and no order changes a result": """
        --microbatch-group-size-per-virtual-pipeline-stage=? --defer-embedding-wgrad-compute --wgrad-deferral-limit=?
        --delay-wgrad-compute""",
    "how messages travel is left to torch.distributed and to NCCL's environment variables": """
        --nccl-communicator-config-path=? --use-nccl-ub --use-sharp --sharp-enabled-group=dp|dp_replica
        --high-priority-stream-groups=* --high-priority-a2a-comm-stream --create-all-gather-group
        --disable-gloo-process-groups --enable-gloo-process-groups --disable-symmetric-registration
        --pipeline-model-parallel-comm-backend=nccl|ucc --symmetric-ar-type=two_shot|one_shot|multimem_all_reduce
        --flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*""",
    "--distributed-timeout-minutes holds at all times": "--distributed-timeout-seconds-after-init=?",
    # memory and time of a step
    "memory stays with torch's allocator": """
        --empty-unused-memory-level=? --no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding""",
    "garbage collection is left to Python": """
        --manual-gc --manual-gc-interval=? --no-manual-gc-eval --disable-manual-gc-eval""",
    "the host and its device meet at every log line": "--train-sync-interval=?",
    "there is no optimizer in host memory that they would serve": "--no-pin-cpu-grads --no-pin-cpu-params",
    "the whole sequence passes an MLP at once": "--mlp-chunks-for-training=1",
    # the data
    "datasets are always memory-mapped": "--data-impl=mmap|infer",
    "datasets are always memory-mapped, which reads the same": "--no-mmap-bin-files --dataloader-defer-npy-index-mmap",
    "the operating system reads ahead": "--mmap-warmup",
    "indices are built once, and kept in --data-cache-path": """
        --num-dataset-builder-threads=? --dataloader-fast-cache-load --per-dataset-sequences-path=?""",
    "a dataset of a blend is built half a percent longer than its weight asks for": "--mid-level-dataset-surplus=0.005",
    "every order of samples is shared by all ranks": "--no-data-sharding",
    "no token of the data counts as padding": "--allow-ambiguous-pad-tokens",
    "texts are tokens already when training begins": """
        --tokenizer-hf-no-include-special-tokens --no-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces""",
    "each type of tokenizer has one implementation": "--legacy-tokenizer --tokenizer-hf-no-use-fast",
    "a tokenizer on the command line wins over the checkpoint's": """
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args""",
    "there is no multi-storage client": "--disable-msc",
    # checkpoints
    "checkpoints have one format, which all ranks write and read in parallel, and any layout loads": """
        --ckpt-format=torch|torch_dist|torch_dcp|zarr|fsdp_dtensor --dist-ckpt-format=torch|torch_dist|torch_dcp|zarr
        --use-dist-ckpt --auto-detect-ckpt-format --ckpt-assume-constant-structure --dist-ckpt-workers=?
        --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load
        --ckpt-fully-parallel-save-process-group=dp|ep_dp --ckpt-fully-parallel-load-process-group=dp|ep_dp
        --ckpt-fully-parallel-load-exchange-algo=broadcast|gather_rounds|gather_object
        --dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-save-pre-mcore-014""",
    "a checkpoint must hold exactly what is asked of it, and every byte is compared with its manifest": """
        --dist-ckpt-strictness=? --verify-integrity --no-ckpt-load-validate-sharding-integrity
        --disable-ckpt-load-validate-sharding-integrity""",
    "--async-save writes from a copy in host memory": """
        --use-persistent-ckpt-worker --async-strategy=nvrx|mcore --async-ckpt-cpu-priority=? --async-ckpt-io-priority=?
        --async-ckpt-use-cpu-shm""",
    "random numbers follow from the seed and the step; no state is kept": "--no-load-rng --no-save-rng",
    "a checkpoint's weights are the main weights, in fp32": "--load-main-params-from-ckpt",
    # the end of a run, and what it tells
    "always so: SIGTERM, SIGUSR1 or Ctrl-C to any rank saves, and ends the run with status 75": """
        --exit-signal-handler --exit-signal=? --exit-signal-handler-for-training --exit-signal-handler-for-dataloader""",
    "NaN and Inf are always looked for; --on-nonfinite says what follows": "--no-check-for-nan-in-loss-and-grad",
    "steps are not run twice in search of faulty hardware": """
        --rerun-mode=disabled|validate_results --result-rejected-tracker-filename=?""",
    "the weights of data-parallel replicas are not compared": "--check-weight-hash-across-dp-replicas-interval=?",
    "there are no timers inside a step": """
        --timing-log-level=? --timing-log-option=? --no-barrier-with-level-1-timing --log-timers-to-tensorboard""",
    "throughput is always told, in TFLOP/s and tokens/s": "--log-throughput",
    "the console and metrics.jsonl tell what is told": """
        --log-progress --log-straggler --disable-straggler-on-startup --straggler-ctrlr-port=? --straggler-minmax-count=?
        --log-energy --log-device-memory-used --log-memory-interval=? --log-max-attention-logit --logging-level=?""",
    "the configuration is saved with every checkpoint": "--config-logger-dir=?",
    "the tracker one_logger is private": """
        --no-one-logger --one-logger-project=? --one-logger-run-name=? --one-logger-async --app-tag-run-name=?
        --app-tag-run-version=?""",
    "it concerns --profile alone": """
        --profile-step-start=? --profile-step-end=? --profile-ranks=* --pytorch-profiler-* --record-shapes --nvtx-ranges""",
    "it concerns --record-memory-history alone": "--memory-snapshot-path=?",
    "tests are run by `make test`": "--test-mode",
    "nothing here waits behind it": "--enable-experimental",
    "it concerns inference alone": """
        --inference-* --no-inference-* --flash-decode --enable-chunked-prefill --disable-chunked-prefill
        --decode-only-cuda-graphs --mlp-chunks-for-prefill=? --nccl-all-reduce-for-prefill --num-speculative-tokens=?
        --use-legacy-static-engine
        --use-same-sampling-seed-across-dp-ranks --chat-template=?""",
    "it concerns the text generation server alone": "--max-tokens-to-oom=?",
}

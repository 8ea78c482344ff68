"""How to run: device, precision, checkpoints, evaluation, logging."""

train = dict(
    output_dir="./output",
    # As --resume (true); "auto" begins anew where there is no checkpoint. null is false, but for a
    # job that torchrun (--max-restarts) or SLURM (requeue) starts again: it goes on with its run.
    resume=None,
    grace_seconds=30,  # after a signal; what still runs then is killed
    init_checkpoint="",  # weights to start from, or to evaluate
    class_weights=None,  # of the focal loss: by name, or "balanced" by how rare each class is
    freeze=[],  # parts that are not trained, by their names: backbone, decoder.stages.0
    max_iter=90000,
    seed=0,
    device="cuda",  # without CUDA the run goes on on the CPU and says so
    # dtype: bfloat16, or float16 with loss scaling, which skips a step whose gradients overflow;
    # after max_skipped_steps of them in a row the run ends. enabled="auto" is true where dtype is
    # the faster one, which is measured on a CPU; a run that goes on keeps what it began with.
    amp=dict(enabled=False, dtype="bfloat16", max_skipped_steps=20),
    # On CUDA: products of float32 as "highest" (exact), "high" (TF32, as the published results) or
    # "medium"; coordinates, boxes and losses are exact whatever it says.
    float32_precision="high",
    # On CUDA: the decoder is recorded and replayed; "auto" where that can be, true or an error.
    cuda_graph="auto",
    # BatchNorms with fixed statistics folded into the backbone's convolutions in training: "auto"
    # on CUDA if that is faster, which is measured at the start and kept by a run that goes on.
    fold_norms="auto",
    deterministic=False,  # the same seed gives the same weights on CUDA as well; slower
    clip_grad=dict(enabled=True, params=dict(max_norm=1.0, norm_type=2.0)),
    accumulation_steps=1,  # split each process's batch into so many parts
    # Several processes. Each has its own running statistics, which agree where they are evaluated
    # or saved. Gradients lie in the buckets that are exchanged, of bucket_cap_mb MiB (null: 25, the
    # first one 1); fp16_compression halves them. static_graph excludes accumulation_steps.
    ddp=dict(
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=None,
        static_graph=False,
    ),
    # Which weights of init_checkpoint are evaluated: null takes their averages where it has them,
    # true insists on these, false takes the trained weights; fine-tuning starts from them.
    model_ema=dict(enabled=False, decay=0.9998, use_ema_weights_for_eval_only=None),
    checkpointer=dict(period=5000, max_to_keep=5),
    # mode: "max" or "min" is best; null goes by the metric, of losses the least.
    best_checkpointer=dict(val_metric="bbox/AP", mode=None),
    # Ends a run whose metric has not become better by more than min_delta in `patience` evaluations
    # one after the other; null never does.
    early_stopping=dict(patience=None, metric="bbox/AP", mode=None, min_delta=0.0),
    eval_period=5000,
    validation_loss=False,  # the losses of the images that are evaluated, beside their AP
    # What matching and labels made of each object, at every evaluation: of all images, or of those
    # of these names. A report answers from it why an object is missed.
    flight_recorder=dict(enabled=False, images=None),
    # Evaluation in float32, bfloat16, float16 or auto, the faster of the first two; if compiled,
    # anew for every size of images, which are padded to multiples of bucket pixels so that there
    # are few. More padding is another AP.
    inference=dict(dtype="float32", compile=False, bucket=1),
    unusable_detections="error",  # NaN or infinite ones; or "warning", which leaves them out
    max_pixels=178_956_970,  # of a picture; larger ones are not read
    log_period=20,
    # Metrics elsewhere as well; params are those of wandb.init, and tracking_uri, experiment_name,
    # run_name of MLflow.
    wandb=dict(enabled=False, params=dict(project="stage_interactor")),
    mlflow=dict(enabled=False, params=dict(experiment_name="stage_interactor")),
    pictures=dict(num_images=12, score_threshold=0.3),  # detections.jpg after the last evaluation
)

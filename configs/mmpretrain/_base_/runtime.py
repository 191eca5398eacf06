# What all configs share: the adapter, the hooks, the seed, and settings for several processes.
default_scope = "mmpretrain"
custom_imports = dict(imports=["ikl_plugins.mmpretrain", "ikl_plugins.mmpretrain.cpu_ranks"])

custom_hooks = [
    dict(type="IKLHook"),
    dict(type="SyncBuffersHook"),  # several ranks: mean statistics of BatchNorm before validation and checkpoint
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=10),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # Two are kept: a process that is killed while it writes one leaves the other.
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2, save_best="accuracy/top1", rule="greater"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="VisualizationHook", enable=False),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # without CUDA cpu_ranks joins a gloo group
)
randomness = dict(seed=0, deterministic=True)
# Named, because MMEngine's own default asks for a GPU. The running sums of a class prior are each rank's own.
model_wrapper_cfg = dict(
    type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False, find_unused_parameters=False
)

visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_level = "INFO"
load_from = None
resume = False

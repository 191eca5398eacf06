# A network of the distillation literature on CIFAR-100, but for its name: data, published recipe, labels alone.
_base_ = ["./cifar100_data.py", "./cifar10_schedule.py", "./runtime.py"]

model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(
        num_classes=100,
        mean=[129.3105, 124.1085, 112.404],  # 255 * (0.5071, 0.4867, 0.4408)
        std=[68.2125, 65.4075, 70.4055],  # 255 * (0.2675, 0.2565, 0.2761)
        to_rgb=False,
    ),
    backbone=dict(type="DistillationNetwork", num_classes=100),
    head=dict(type="LogitsClsHead", num_classes=100, loss=dict(type="CrossEntropyLoss", loss_weight=1.0), topk=(1,)),
)

default_hooks = dict(
    logger=dict(interval=100),
    # Published: the best of all epochs on the test images. Here the last one counts, which they have not chosen, and
    # all 50,000 training images are trained on, as published.
    checkpoint=dict(save_best=None),
)

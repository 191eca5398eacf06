# ResNet-18 for ImageNet, initialised as torchvision does, which is what the official code trains.
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    # MMPretrain's default sets the last normalisation of each block to 0, torchvision's does not.
    backbone=dict(type="ResNet", depth=18, out_indices=(3,), zero_init_residual=False),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=512,
        init_cfg=None,  # torch's own, uniform; MMPretrain's default is a normal distribution of deviation 0.01
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)
